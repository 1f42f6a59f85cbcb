"""Streams text from a bundle: python examples/generate.py BUNDLE "PROMPT" [LOOPS]. Needs no torch."""

import sys

from mythos_export import load


def main() -> None:
    bundle, prompt, *rest = sys.argv[1:]
    runner = load(bundle)
    generation = runner.generate(
        prompt, max_new_tokens=100, n_loops=int(rest[0]) if rest else None, temperature=0.8, seed=1
    )
    for token in generation:
        print(token.text, end="", flush=True)
    print(
        f"\n{generation.stats.decode_tokens_per_second:.0f} tokens/s, mean exit loop {generation.stats.mean_exit_loop:.1f}"
    )


if __name__ == "__main__":
    main()
