/* mythos/runtime.h is C: this is compiled as such. */
#include "mythos/runtime.h"

/* What a program of the first release knew of a request. */
size_t first_request_size(void) { return offsetof(mythos_request, stop_texts); }
