#include "footprint.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "error.h"

namespace mythos {
namespace {

using nlohmann::json;

constexpr double kFloat = 4;  // bytes: graphs that a CPU runs compute in float32

// Counts bytes of a layer. Its matrices are named as the manifest's quantization names them.
class Layer {
 public:
  Layer(const json& quantization, const std::string& name, double dim, const json& layer)
      : matrices_(quantization.is_null() ? json::object() : quantization.at("matrices")), name_(name), dim_(dim) {
    attention(layer.at("attention"));
    always_ += kFloat * 2 * dim;
    feed_forward(layer.at("feed_forward"));
  }

  double read(double tokens) const {
    const double left_out = n_experts_ > 0 ? std::pow(1 - top_k_ / n_experts_, tokens) : 0;
    return always_ + n_experts_ * (1 - left_out) * expert_;
  }

  // Of so many numbers of a matrix, its scales included.
  static double bytes(const json& matrices, const std::string& matrix, double numbers) {
    if (!matrices.contains(matrix)) return numbers * kFloat;
    const json& stored = matrices.at(matrix);
    return numbers * ((stored.at("format") == "int4" ? 0.5 : 1.0) + 2.0 / stored.at("stored_block").get<double>());
  }

 private:
  double matrix(const std::string& part, double numbers) const { return bytes(matrices_, name_ + part, numbers); }

  void attention(const json& config) {
    const auto number = [&](const char* member) { return config.at(member).get<double>(); };
    const double heads = number("n_heads");
    if (config.at("kind") == "latent") {
      const double rank = number("kv_lora_rank"), rope = number("qk_rope_head_dim"), nope = number("qk_nope_head_dim");
      const double queries = heads * (nope + rope), low = number("q_lora_rank"), values = heads * number("v_head_dim");
      const double down = (low > 0 ? low : queries) + rank + rope;
      always_ += matrix(".attn.down.weight", dim_ * down) + matrix(".attn.q_up.weight", low * queries) +
                 matrix(".attn.w_uk", heads * nope * rank) + matrix(".attn.w_uv", values * rank) + matrix(".attn.out.weight", values * dim_);
      always_ += kFloat * (low + rank + (config.value("down_bias", false) ? down : 0));
    } else {
      const double queries = heads * number("head_dim"), all = queries + 2 * number("n_kv_heads") * number("head_dim");
      always_ += matrix(".attn.qkv.weight", dim_ * all) + matrix(".attn.out.weight", queries * dim_);
      always_ += kFloat * (config.value("qkv_bias", false) ? all : 0);
    }
    always_ += kFloat * (config.value("out_bias", false) ? dim_ : 0);
  }

  double swiglu(double hidden, const char* suffix = "") const {
    return matrix(std::string(".ffn.gate_up") + suffix, 2 * dim_ * hidden) + matrix(std::string(".ffn.down") + suffix, dim_ * hidden);
  }

  void feed_forward(const json& config) {
    if (config.at("kind") == "dense") {
      const double hidden = config.at("hidden_dim").get<double>();
      const bool bias = config.value("bias", false);
      always_ += swiglu(hidden, bias ? ".weight" : "") + kFloat * (bias ? 2 * hidden + dim_ : 0);
      return;
    }
    const double hidden = config.at("expert_dim").get<double>();
    n_experts_ = config.at("n_experts").get<double>();
    top_k_ = config.at("top_k").get<double>();
    expert_ = swiglu(hidden);
    always_ += swiglu(hidden * config.value("n_shared_experts", 0.0)) + kFloat * (dim_ + 1) * n_experts_;
  }

  const json matrices_;
  const std::string name_;
  const double dim_;
  double always_ = 0, expert_ = 0, n_experts_ = 0, top_k_ = 0;
};

}  // namespace

double weight_bytes_read(const Manifest& manifest, int64_t n_loops, double tokens) try {
  const json model = json::parse(manifest.model), quantization = json::parse(manifest.quantization);
  const double dim = model.at("dim").get<double>();
  const auto read = [&](const char* group, const std::string& name) {
    double bytes = 0;
    if (!model.contains(group)) return bytes;
    for (size_t i = 0; i < model.at(group).size(); ++i)
      bytes += Layer(quantization, name + "." + std::to_string(i), dim, model.at(group).at(i)).read(tokens);
    return bytes;
  };
  double looped = read("loop_layers", "recurrent.layers");
  if (model.contains("loop") && !model.at("loop").is_null())
    looped += kFloat * (dim * (4 + 2 * model.at("loop").at("lora_rank").get<double>()) + 1);
  const bool tied = model.value("tie_embeddings", true);
  const double head = Layer::bytes(quantization.is_null() ? json::object() : quantization.at("matrices"), tied ? "embed" : "head",
                                   model.at("vocab_size").get<double>() * dim);
  return read("prelude", "prelude") + read("coda", "coda") + static_cast<double>(n_loops) * looped + head + kFloat * dim;
} catch (const json::exception& problem) {
  damaged(std::string("the manifest describes no model that this release knows: ") + problem.what() + "; export the checkpoint again");
}

}  // namespace mythos
