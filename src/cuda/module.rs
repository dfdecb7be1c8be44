//! The compiled kernels, which are embedded, and what has been loaded of them in each context.

use crate::tiles::STATIC_SHARED;
use candle_core::cuda_backend::cudarc::{
    driver::{CudaContext, CudaFunction, CudaModule, DriverError},
    nvrtc::Ptx,
};
use std::{
    collections::{hash_map::Entry, HashMap},
    sync::{Arc, LazyLock, Mutex, MutexGuard},
};

/// A compiled file of `kernels/`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Image {
    Rows,
    Seed,
    SeedFilter,
    Nearest,
    Pairwise,
    Prepare,
    Split,
    AssignSimt,
    AssignNarrow,
    AssignNearSm90,
    AssignSm80,
    AssignSm90,
    AssignSplitSm90,
    AssignWideSm90,
    Attend,
    AttendCoded,
    FitLine,
    FitNarrow,
    FitResident,
    Greedy,
    Halve,
    Lut,
    LutSm90,
    Near,
    Recheck,
    Route,
    Select,
    Sort,
    Update,
    UpdateChanges,
}

impl Image {
    fn bytes(self) -> &'static [u8] {
        match self {
            Self::Rows => include_bytes!(concat!(env!("OUT_DIR"), "/rows.fatbin")),
            Self::Seed => include_bytes!(concat!(env!("OUT_DIR"), "/seed.fatbin")),
            Self::SeedFilter => include_bytes!(concat!(env!("OUT_DIR"), "/seed_filter.fatbin")),
            Self::Nearest => include_bytes!(concat!(env!("OUT_DIR"), "/nearest.fatbin")),
            Self::Pairwise => include_bytes!(concat!(env!("OUT_DIR"), "/pairwise.fatbin")),
            Self::Prepare => include_bytes!(concat!(env!("OUT_DIR"), "/prepare.fatbin")),
            Self::Split => include_bytes!(concat!(env!("OUT_DIR"), "/split.fatbin")),
            Self::AssignSimt => include_bytes!(concat!(env!("OUT_DIR"), "/assign_simt.fatbin")),
            Self::AssignNarrow => include_bytes!(concat!(env!("OUT_DIR"), "/assign_narrow.fatbin")),
            Self::AssignNearSm90 => include_bytes!(concat!(env!("OUT_DIR"), "/assign_near_sm90.fatbin")),
            Self::AssignSm80 => include_bytes!(concat!(env!("OUT_DIR"), "/assign_sm80.fatbin")),
            Self::AssignSm90 => include_bytes!(concat!(env!("OUT_DIR"), "/assign_sm90.fatbin")),
            Self::AssignSplitSm90 => include_bytes!(concat!(env!("OUT_DIR"), "/assign_split_sm90.fatbin")),
            Self::AssignWideSm90 => include_bytes!(concat!(env!("OUT_DIR"), "/assign_wide_sm90.fatbin")),
            Self::Attend => include_bytes!(concat!(env!("OUT_DIR"), "/attend.fatbin")),
            Self::AttendCoded => include_bytes!(concat!(env!("OUT_DIR"), "/attend_coded.fatbin")),
            Self::FitLine => include_bytes!(concat!(env!("OUT_DIR"), "/fit_line.fatbin")),
            Self::FitNarrow => include_bytes!(concat!(env!("OUT_DIR"), "/fit_narrow.fatbin")),
            Self::FitResident => include_bytes!(concat!(env!("OUT_DIR"), "/fit_resident.fatbin")),
            Self::Greedy => include_bytes!(concat!(env!("OUT_DIR"), "/greedy.fatbin")),
            Self::Halve => include_bytes!(concat!(env!("OUT_DIR"), "/halve.fatbin")),
            Self::Lut => include_bytes!(concat!(env!("OUT_DIR"), "/lut.fatbin")),
            Self::LutSm90 => include_bytes!(concat!(env!("OUT_DIR"), "/lut_sm90.fatbin")),
            Self::Near => include_bytes!(concat!(env!("OUT_DIR"), "/near.fatbin")),
            Self::Recheck => include_bytes!(concat!(env!("OUT_DIR"), "/recheck.fatbin")),
            Self::Route => include_bytes!(concat!(env!("OUT_DIR"), "/route.fatbin")),
            Self::Select => include_bytes!(concat!(env!("OUT_DIR"), "/select.fatbin")),
            Self::Sort => include_bytes!(concat!(env!("OUT_DIR"), "/sort.fatbin")),
            Self::Update => include_bytes!(concat!(env!("OUT_DIR"), "/update.fatbin")),
            Self::UpdateChanges => include_bytes!(concat!(env!("OUT_DIR"), "/changes.fatbin")),
        }
    }
}

/// The functions that have been loaded, by context. The handles keep their context alive, so an address is never reused.
#[derive(Default)]
pub(super) struct Loaded {
    modules: HashMap<(usize, Image), Arc<CudaModule>>,
    /// With the dynamic shared memory that each has been allowed.
    pub(super) functions: HashMap<(usize, &'static str, &'static str), (CudaFunction, usize)>,
    /// The number of clusters of 1, 2, .. blocks that run at once; empty where the code is for GPUs without clusters.
    pub(super) clusters: HashMap<(usize, &'static str, &'static str), Vec<usize>>,
    /// The number of blocks that run at once, by their threads and dynamic shared memory.
    pub(super) blocks: HashMap<(usize, &'static str, &'static str, usize, usize), usize>,
}

impl Loaded {
    /// The module of an image, loaded into the context if it is not there yet.
    pub(super) fn module(
        &mut self,
        context: &Arc<CudaContext>,
        image: Image,
    ) -> std::result::Result<Arc<CudaModule>, DriverError> {
        Ok(match self.modules.entry((context.cu_ctx() as usize, image)) {
            Entry::Occupied(known) => known.get().clone(),
            Entry::Vacant(unknown) => {
                unknown.insert(context.load_module(Ptx::from_binary(image.bytes().to_vec()))?).clone()
            }
        })
    }
}

/// Locks what has been loaded.
pub(super) fn loaded() -> MutexGuard<'static, Loaded> {
    static LOADED: LazyLock<Mutex<Loaded>> = LazyLock::new(Mutex::default);
    LOADED.lock().unwrap_or_else(|e| e.into_inner())
}

/// Dynamic shared memory that a launch gets unasked, beside what its kernel has of its own.
pub(super) const FREE_SHARED: usize = 48 * 1024 - STATIC_SHARED;
