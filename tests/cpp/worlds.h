// Communicators of threads and of processes, and collectives on them checked against what they must give.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "programs.h"
#include "ranks.h"

namespace paracomm_test {

using Comms = std::vector<std::shared_ptr<Communicator>>;

inline CommOptions small_windows() {
  CommOptions options;
  options.window_bytes = 16 * 1024;
  options.staging_bytes = 64 * 1024;
  options.timeout_s = 300;
  return options;
}

/// Where a process says it lives: ranks with equal hosts share memory.
inline std::shared_ptr<Communicator> connect(const Process& process, const std::string& host,
                                             const CommOptions& options = small_windows()) {
  ListenerOptions listening;
  listening.host_id = host;
  Listener listener(listening);
  return Communicator::connect(process.rank, listener, process.exchange(listener.publish()), options,
                               Deadline::after(60));
}

inline Call call_of(int program, const Side& side, bool uneven) {
  Call call;
  call.program = program;
  call.dtype = DType::int32;
  for (size_t block : side.blocks) call.count += block;
  if (uneven) {
    call.blocks = side.blocks;
    call.output_blocks = side.output_blocks;
    call.largest_block = side.largest_chunk;
  }
  return call;
}

/// A copy of the values in ordinary memory, or in the arena.
class Buffer {
 public:
  Buffer(const std::vector<int32_t>& values, bool mapped) : nbytes_(values.size() * sizeof(int32_t)), mapped_(mapped) {
    data_ = mapped ? Arena::process().allocate(nbytes_) : ::operator new(nbytes_);
    if (nbytes_ > 0) std::memcpy(data_, values.data(), nbytes_);
  }
  ~Buffer() {
    if (mapped_)
      Arena::process().release(data_);
    else
      ::operator delete(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  void read(std::vector<int32_t>& values) const {
    if (nbytes_ > 0) std::memcpy(values.data(), data_, nbytes_);
  }

 private:
  size_t nbytes_;
  bool mapped_;
  void* data_;
};

/// Runs one collective on this rank; all ranks call it with the same arguments.
inline void run_case(Communicator& comm, const World& world, int program, const std::vector<size_t>& blocks,
                     bool in_place, bool mapped) {
  Side side = std::move(make_sides(world, blocks, in_place)[static_cast<size_t>(comm.rank())]);
  const Buffer input(side.input, mapped), output(side.output, mapped);
  Call call = call_of(program, side, world.by_block());
  if (side.has_input) call.input = in_place ? output.data() : input.data();
  if (side.has_output) call.output = output.data();
  comm.run(call);
  output.read(side.output);
  if (!is_right(side))
    fail(__FILE__, __LINE__,
         world.label() + " rank " + std::to_string(comm.rank()) + " is wrong over " +
             comm.transport(comm.rank() == 0 ? 1 : 0));
}

}  // namespace paracomm_test
