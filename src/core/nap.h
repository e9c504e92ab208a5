// What a thread does between two naps of a long wait: the Python bindings look for signals (Ctrl-C) there.
#pragma once

namespace paracomm {

/// Null, or called every tenth of a second or so by a thread that waits. May throw, which ends the wait.
inline thread_local void (*nap_hook)() = nullptr;

inline void between_naps() {
  if (nap_hook != nullptr) nap_hook();
}

}  // namespace paracomm
