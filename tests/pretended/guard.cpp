// What torch asks of CUDA in C++: whether there is any, which device is current, which streams it has.
// Guard is torch's own stand-in for tests. torch looks for hooks of this name once, as it is loaded.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}

static c10::DeviceIndex devices = 1;

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return devices; }
  DeviceIndex deviceCount() const override { return devices; }
  DeviceIndex getCurrentDevice() const override { return Guard::getDeviceIndex(); }
  void setCurrentDevice(DeviceIndex index) const override { Guard::setDeviceIndex(index); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}

extern "C" void set_device_count(int count) { devices = count; }
extern "C" int current_device() { return Guard::getDeviceIndex(); }
extern "C" void set_device(int index) { Guard::setDeviceIndex(index); }
