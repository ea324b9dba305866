// A CUDA device guard that does nothing: torch's CPU build then takes fake CUDA tensors for indexing and autograd.
#include <c10/core/impl/DeviceGuardImplInterface.h>

extern "C" void install() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(
      new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
}
