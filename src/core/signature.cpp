#include "core/signature.h"

#include <cstddef>

namespace paracomm {
namespace {

constexpr const char* kCollectiveNames[] = {"all_reduce",     "reduce",     "broadcast", "all_gather",
                                            "reduce_scatter", "all_to_all", "gather",    "scatter",
                                            "barrier",        "send",       "recv",      "custom"};

bool reduces(Collective collective) {
  return collective == Collective::all_reduce || collective == Collective::reduce ||
         collective == Collective::reduce_scatter || collective == Collective::custom;
}

std::string call_of(const Signature& s) {
  return std::string(name_of(s.collective)) + " #" + std::to_string(s.sequence);
}

/// Collects "what A here, B there" clauses.
class Clauses {
 public:
  void add(const char* what, const std::string& here, const std::string& there) {
    if (here == there) return;
    if (!text_.empty()) text_ += "; ";
    text_ += std::string(what) + ' ' + here + " here, " + there + " there";
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

}  // namespace

const char* name_of(Collective collective) noexcept {
  const auto i = static_cast<size_t>(collective);
  return i < sizeof kCollectiveNames / sizeof *kCollectiveNames ? kCollectiveNames[i] : "unknown collective";
}

const char* name_of(Processor processor) noexcept { return processor == Processor::host ? "host" : "device"; }

std::string describe(const Signature& signature) {
  std::string text = call_of(signature);
  if (signature.collective == Collective::barrier) return text;
  text += std::string(" (") + name_of(signature.dtype) + " x " + std::to_string(signature.count);
  if (reduces(signature.collective)) text += std::string(", ") + name_of(signature.op);
  if (signature.collective == Collective::send) return text + ", tag " + std::to_string(signature.root) + ')';
  if (signature.root >= 0) text += ", root " + std::to_string(signature.root);
  return text + ')';
}

std::string difference(const Signature& here, const Signature& there) {
  Clauses clauses;
  // Ranks in different calls: dtype, count and the rest follow from that and would only hide it.
  if (here.collective != there.collective) return "called " + describe(here) + " here, " + describe(there) + " there";
  clauses.add("sequence number", std::to_string(here.sequence), std::to_string(there.sequence));
  clauses.add("dtype", name_of(here.dtype), name_of(there.dtype));
  clauses.add("count", std::to_string(here.count), std::to_string(there.count));
  clauses.add("reduction", name_of(here.op), name_of(there.op));
  clauses.add("processor", name_of(here.processor), name_of(there.processor));
  clauses.add("root", std::to_string(here.root), std::to_string(there.root));
  // The fingerprint says that the schedules differ, not how; unequal worlds or tuning tables are the usual cause.
  if (clauses.text().empty() && here.schedule != there.schedule)
    return "schedule fingerprint " + std::to_string(here.schedule) + " here, " + std::to_string(there.schedule) +
           " there (the ranks chose different algorithms)";
  return clauses.text().empty() ? "no difference" : clauses.text();
}

}  // namespace paracomm
