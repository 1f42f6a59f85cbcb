// The choice is by score plus bias (arXiv 2408.15664), where there are groups out of the best of them (arXiv 2405.04434); weights are
// scores without the bias: the softmax of logits or, as in DeepSeek-V3 (arXiv 2412.19437), their sigmoid.
#include "routing.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

namespace mythos {
namespace {

// order[0, k): the indices of the largest values, largest first, the first of equals.
void Largest(const std::vector<float>& values, size_t k, std::vector<size_t>& order) {
  std::iota(order.begin(), order.end(), size_t{0});
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(k), order.end(), [&](size_t i, size_t j) {
    return values[i] > values[j] || (values[i] == values[j] && i < j);
  });
}

}  // namespace

Router::Router(const Routing& routing, size_t n)
    : routing_(routing), scores_(n), biased_(n), group_(n / routing.n_groups), group_scores_(routing.n_groups), order_(n),
      groups_(routing.n_groups) {}

void Router::KeepBestGroups() {
  const size_t size = group_.size();
  const auto best = static_cast<std::ptrdiff_t>(routing_.group_top_k);
  for (size_t g = 0; g < groups_.size(); ++g) {
    std::copy_n(biased_.begin() + static_cast<std::ptrdiff_t>(g * size), size, group_.begin());
    std::partial_sort(group_.begin(), group_.begin() + best, group_.end(), std::greater<float>());
    group_scores_[g] = std::accumulate(group_.begin(), group_.begin() + best, 0.0f);
  }
  Largest(group_scores_, routing_.top_k_groups, groups_);
  for (size_t i = routing_.top_k_groups; i < groups_.size(); ++i)
    std::fill_n(biased_.begin() + static_cast<std::ptrdiff_t>(groups_[i] * size), size, std::numeric_limits<float>::lowest());
}

void Router::Choose(const float* logits, const float* bias, size_t* experts, float* weights) {
  for (size_t e = 0; e < scores_.size(); ++e) {
    scores_[e] = routing_.sigmoid ? 1.0f / (1.0f + std::exp(-logits[e])) : logits[e];
    biased_[e] = scores_[e] + bias[e];
  }
  if (routing_.n_groups > 1) KeepBestGroups();
  Largest(biased_, routing_.top_k, order_);
  std::copy_n(order_.begin(), routing_.top_k, experts);

  float sum = 0.0f;
  if (routing_.sigmoid) {
    for (size_t i = 0; i < routing_.top_k; ++i) sum += weights[i] = scores_[experts[i]];
    sum = routing_.normalized ? sum + 1e-20f : 1.0f;  // they may all be 0
  } else {
    float top = scores_[experts[0]];
    for (size_t i = 1; i < routing_.top_k; ++i) top = std::max(top, scores_[experts[i]]);
    if (!routing_.normalized) top = *std::max_element(scores_.begin(), scores_.end());
    for (size_t i = 0; i < routing_.top_k; ++i) sum += weights[i] = std::exp(scores_[experts[i]] - top);
    if (!routing_.normalized) {
      sum = 0.0f;
      for (const float score : scores_) sum += std::exp(score - top);
    }
  }
  for (size_t i = 0; i < routing_.top_k; ++i) weights[i] = weights[i] / sum * routing_.scale;
}

}  // namespace mythos
