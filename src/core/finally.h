// What is done when a scope is left, however that is: `const Finally leave{[&] { --users; }};`.
#pragma once

namespace paracomm {

template <class Do>
struct Finally {
  Do run;
  ~Finally() { run(); }
};
template <class Do>
Finally(Do) -> Finally<Do>;

}  // namespace paracomm
