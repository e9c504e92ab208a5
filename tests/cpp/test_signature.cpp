// Names and texts of dtypes, reductions and signatures.
#include "core/signature.h"

#include "check.h"

using namespace paracomm;

namespace {

Signature all_reduce_of(uint64_t count) {
  Signature s;
  s.sequence = 812;
  s.collective = Collective::all_reduce;
  s.dtype = DType::float32;
  s.count = count;
  return s;
}

void test_dtypes() {
  const size_t sizes[kDTypes] = {8, 4, 2, 2, 1, 2, 4, 8, 1, 1, 2, 4, 8};
  for (int i = 0; i < kDTypes; ++i) CHECK_EQ(size_of(static_cast<DType>(i)), sizes[i]);
  CHECK_EQ(std::string(name_of(DType::bfloat16)), "bfloat16");
  CHECK_EQ(std::string(name_of(DType::boolean)), "bool");
  CHECK_EQ(std::string(name_of(ReduceOp::bxor)), "bxor");
}

void test_bytes_from_strangers_have_names() {
  CHECK_EQ(size_of(static_cast<DType>(200)), size_t{0});
  CHECK_EQ(std::string(name_of(static_cast<DType>(200))), "unknown dtype");
  CHECK_EQ(std::string(name_of(static_cast<ReduceOp>(200))), "unknown reduction");
  CHECK_EQ(std::string(name_of(static_cast<Collective>(200))), "unknown collective");
}

void test_describe() {
  CHECK_EQ(describe(all_reduce_of(1024)), "all_reduce #812 (float32 x 1024, sum)");
  Signature s = all_reduce_of(3);
  s.collective = Collective::broadcast;
  s.root = 2;
  CHECK_EQ(describe(s), "broadcast #812 (float32 x 3, root 2)");
  s.collective = Collective::barrier;
  CHECK_EQ(describe(s), "barrier #812");
}

void test_difference() {
  const Signature here = all_reduce_of(1024);
  CHECK_EQ(difference(here, here), "no difference");

  Signature there = here;
  there.dtype = DType::int32;
  CHECK_EQ(difference(here, there), "dtype float32 here, int32 there");
  there.count = 7;
  there.op = ReduceOp::max;
  CHECK_EQ(difference(here, there),
           "dtype float32 here, int32 there; count 1024 here, 7 there; reduction sum here, max there");

  there = here;
  there.sequence = 811;
  CHECK_EQ(difference(here, there), "sequence number 812 here, 811 there");

  there = here;
  there.collective = Collective::barrier;
  CHECK_EQ(difference(here, there), "called all_reduce #812 (float32 x 1024, sum) here, barrier #812 there");

  there = here;
  there.schedule = 5;
  CHECK(difference(here, there).find("different algorithms") != std::string::npos);

  there = here;
  there.root = 1;
  CHECK_EQ(difference(here, there), "root -1 here, 1 there");
}

}  // namespace

int main() {
  test_dtypes();
  test_bytes_from_strangers_have_names();
  test_describe();
  test_difference();
}
