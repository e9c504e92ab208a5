#include "devices.h"

using namespace paracomm;
using namespace paracomm_test;

int main() {
  const std::vector<World> worlds = load_worlds();
  for (const char* name : {"all_reduce.ring", "all_reduce.one_shot", "all_reduce.ordered"}) {
    const World& world = find_world(worlds, name, 4);
    DeviceWorld devices(4);
    run_threads(4, [&](int rank) {
      DeviceStream stream(rank);
      const int program = devices[rank].add_program(world.programs[static_cast<size_t>(rank)]);
      for (const size_t count : {size_t{0}, size_t{1}, size_t{5}, size_t{1009}, size_t{30'011}, size_t{262'144}}) {
        Side side = std::move(make_sides(world, {count}, false)[static_cast<size_t>(rank)]);
        std::vector<std::byte> in(count * 4), out(count * 4);
        std::memcpy(in.data(), side.input.data(), in.size());
        DeviceBuffer input(in), output(out);
        Call call = call_of(program, side, false);
        call.input = input.data();
        call.output = output.data();
        call.timeout_s = 20;
        devices[rank].submit_device(call, stream.number())->wait();
        out = output.bytes();
        std::memcpy(side.output.data(), out.data(), out.size());
        CHECK(is_right(side));
      }
    });
    std::printf("%s fine\n", name);
  }
}
