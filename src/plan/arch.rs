//! An [`Arch`] is what a plan knows of a device.

use crate::tiles::STATIC_SHARED;

/// The device that a fit runs on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arch {
    Cpu {
        /// Whether it has AMX, and this process may use it.
        amx: bool,
    },
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    Cuda {
        /// Compute capability, 90 for 9.0.
        capability: u32,
        /// Multiprocessors.
        processors: usize,
    },
}

impl Arch {
    /// A processor of which nothing more is known.
    pub const CPU: Self = Self::Cpu { amx: false };

    pub fn is_cpu(self) -> bool {
        matches!(self, Self::Cpu { .. })
    }
}

/// The shared memory that a block can ask for at its launch, in bytes: what the device gives it, less what kernels with
/// much of it have of their own.
pub(crate) fn shared_memory(arch: Arch) -> Option<usize> {
    let all = match arch {
        Arch::Cpu { .. } => return None,
        Arch::Cuda { capability: 80 | 87, .. } => 163 << 10,
        Arch::Cuda { capability: 90 | 100 | 103, .. } => 227 << 10,
        Arch::Cuda { .. } => 99 << 10,
    };
    Some(all - STATIC_SHARED)
}
