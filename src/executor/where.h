// How errors name an operation, the rank it failed on, and the place in it.
#pragma once

#include <string>

#include "core/signature.h"
#include "schedule/plan.h"

namespace paracomm {

/// "all_reduce[ring] #7 rank 3 (hostB)".
std::string name_of_call(const Signature& signature, const std::string& schedule, int rank, const std::string& host);
/// " at op 5/14 (chunk 2, 1048576 bytes)"; `index` counts from 0.
std::string name_of_place(const Plan& plan, size_t index);
/// "recv from rank 2 (hostB) timed out after 30 s, the timeout of this call".
std::string name_of_timeout(const char* what, int peer, const std::string& host, double timeout_s);

}  // namespace paracomm
