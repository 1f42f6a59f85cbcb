// What a step reads and writes, counted from the manifest's description of the model: as mythos_export/footprint.py does.
#pragma once

#include "bundle.h"

namespace mythos {

// Bytes of weights that a step over so many tokens reads, looped layers once a loop; of routed experts those that the tokens choose in
// the mean, were every choice as likely. Throws Error where the description is of no model that this release knows.
double weight_bytes_read(const Manifest& manifest, int64_t n_loops, double tokens);

}  // namespace mythos
