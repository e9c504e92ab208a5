// Errors of libparacomm. The library throws these; it never prints, aborts or exits.
#pragma once

#include <stdexcept>
#include <string>

namespace paracomm {

enum class ErrorKind { error, peer_lost, timeout, mismatch, schedule, invalid_argument, security };

/// One exception type: `kind()` tells which Python class the bindings raise.
class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace paracomm
