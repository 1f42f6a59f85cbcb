// Which routed experts each token goes to, and with what weight.
#pragma once
#include <cstddef>
#include <vector>

namespace mythos {

// How experts are chosen; see RoutingConfig in mythos_export/config.py.
struct Routing {
  size_t top_k = 1;
  bool sigmoid = false;      // experts are weighed by the sigmoid of their logits, else by the softmax
  bool normalized = true;    // weights of the chosen are divided by their sum
  float scale = 1.0f;        // of the weights
  size_t n_groups = 1;       // equal runs of experts,
  size_t top_k_groups = 1;   // of which so many are chosen from:
  size_t group_top_k = 1;    // those with the largest sum of their best so many
};

// Chooses for one token; logits, bias [n] of the routed experts.
class Router {
 public:
  Router(const Routing& routing, size_t n);
  // Writes top_k experts, best first, and their weights.
  void Choose(const float* logits, const float* bias, size_t* experts, float* weights);

 private:
  void KeepBestGroups();

  const Routing routing_;
  std::vector<float> scores_, biased_, group_;  // of experts, the same with their bias, one group's sorted
  std::vector<float> group_scores_;
  std::vector<size_t> order_, groups_;
};

}  // namespace mythos
