// Checks for the C++ tests: the first that fails says where and ends the program with 1.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "core/error.h"

namespace paracomm_test {

/// A sanitizer makes a test up to twenty times as long. Long ones run a part then: which numbers come out does not
/// depend on it.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: FAILED: %s\n", file, line, what.c_str());
  std::fflush(nullptr);
  std::_Exit(1);
}

template <class T>
std::string show(const T& value) {
  if constexpr (requires { std::string(value); }) {
    return std::string(value);
  } else if constexpr (requires { std::to_string(value); }) {
    return std::to_string(value);
  } else {
    return "?";
  }
}

template <class Actual, class Expected>
void check_equal(const char* file, int line, const char* what, const Actual& actual, const Expected& expected) {
  if (actual == expected) return;
  fail(file, line, std::string(what) + ": " + show(actual) + " is not " + show(expected));
}

}  // namespace paracomm_test

#define CHECK(condition)                                                                  \
  do {                                                                                    \
    if (!(condition)) ::paracomm_test::fail(__FILE__, __LINE__, "CHECK(" #condition ")"); \
  } while (0)

#define CHECK_EQ(actual, expected) \
  ::paracomm_test::check_equal(__FILE__, __LINE__, "CHECK_EQ(" #actual ", " #expected ")", actual, expected)

/// The expression throws paracomm::Error of this kind, and its message contains `fragment`.
#define CHECK_THROWS(expression, error_kind, fragment)                                                      \
  do {                                                                                                      \
    bool check_thrown = false;                                                                              \
    try {                                                                                                   \
      (void)(expression);                                                                                   \
    } catch (const ::paracomm::Error& check_error) {                                                        \
      check_thrown = true;                                                                                  \
      if (check_error.kind() != (error_kind))                                                               \
        ::paracomm_test::fail(__FILE__, __LINE__,                                                           \
                              std::string(#expression " threw another kind: ") + check_error.what());       \
      if (std::string(check_error.what()).find(fragment) == std::string::npos)                              \
        ::paracomm_test::fail(__FILE__, __LINE__, std::string(#expression " said: ") + check_error.what()); \
    }                                                                                                       \
    if (!check_thrown) ::paracomm_test::fail(__FILE__, __LINE__, #expression " did not throw");             \
  } while (0)
