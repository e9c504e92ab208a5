#include "executor/where.h"

#include <cstdio>

namespace paracomm {

std::string name_of_call(const Signature& signature, const std::string& schedule, int rank, const std::string& host) {
  return std::string(name_of(signature.collective)) + "[" + schedule + "] #" + std::to_string(signature.sequence) +
         " rank " + std::to_string(rank) + " (" + host + ")";
}

std::string name_of_place(const Plan& plan, size_t index) {
  const Instruction& instruction = plan.instructions()[index];
  return " at op " + std::to_string(index + 1) + "/" + std::to_string(plan.instructions().size()) + " (chunk " +
         std::to_string(instruction.size_chunk) + ", " + std::to_string(plan.nbytes(instruction, 0)) + " bytes)";
}

std::string name_of_timeout(const char* what, int peer, const std::string& host, double timeout_s) {
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%g s", timeout_s);
  return std::string(what) + " rank " + std::to_string(peer) + " (" + host + ") timed out after " + seconds +
         ", the timeout of this call";
}

}  // namespace paracomm
