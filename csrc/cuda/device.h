// The door to the device: an executor for a communicator, on a GPU or on an emulated one.
#pragma once

#include <memory>
#include <string>

#include "executor/device_executor.h"

namespace paracomm {

namespace cuda {
/// GPUs of this machine that can be used; 0 where there are none, and `why` says the reason then.
int device_count(std::string* why = nullptr);
/// The number of the device that the memory lies on. Throws Error(invalid_argument) if it is no device's.
int device_of(const void* data);
/// What suits most.
DeviceOptions default_options();
/// Throws Error(invalid_argument) if there is no such device.
std::shared_ptr<DeviceExecutor> make_device_executor(int device, const DeviceOptions& options, DeviceHooks hooks);
}  // namespace cuda

namespace emulated {
int device_count(std::string* why = nullptr);
int device_of(const void* data);
/// Fewer threads: each is a fiber.
DeviceOptions default_options();
std::shared_ptr<DeviceExecutor> make_device_executor(int device, const DeviceOptions& options, DeviceHooks hooks);
}  // namespace emulated

}  // namespace paracomm
