// exp of many numbers at once.
#pragma once

#include <cstddef>

namespace mythos {

// results[i] = exp(x[i]) for x of at most 0, within 2 units in the last place; 0 where that is below 2^-1021. They may be the same
// memory. Returns the sum of the results.
double exponentials(const double* x, size_t n, double* results);

}  // namespace mythos
