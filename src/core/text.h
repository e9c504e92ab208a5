// Text that is cut: it may cross a wire and become a Python str.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>

namespace paracomm {

/// At most the first `nbytes` bytes, cut between two characters of UTF-8.
inline std::string cut_text(const std::string& text, size_t nbytes) {
  constexpr size_t kLongestCharacter = 4;
  if (text.size() <= nbytes) return text;
  size_t end = nbytes;
  const size_t least = nbytes - std::min(nbytes, kLongestCharacter);
  while (end > least && (static_cast<unsigned char>(text[end]) & 0xC0u) == 0x80u) --end;
  return text.substr(0, end);
}

}  // namespace paracomm
