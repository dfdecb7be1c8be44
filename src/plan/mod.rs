//! The kernels of a fit, decided once from its sizes, its rows' layout and the device. Ops take their part of it and choose nothing.

pub(crate) mod arch;
pub(crate) mod assign;
pub(crate) mod bytes;
pub(crate) mod on_chip;
pub(crate) mod skip;
pub(crate) mod sort;
pub(crate) mod update;

use crate::{
    error::Result,
    kmeans::{EmptyClusters, KMeans},
    metric::Metric,
    problem::Problem,
    rows::RowLayout,
    tiles,
};
use arch::Arch;
use assign::AssignPlan;
use bytes::bytes;
use on_chip::{FitResident, OnChip};
use skip::SkipPlan;
use std::{collections::HashSet, fmt, sync::Mutex};
use update::UpdatePlan;

/// The kernels, tiles and memory of a fit. Set `FLASH_KMEANS_PRINT_PLAN=1` to have each new plan printed once to stderr.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Plan {
    /// The assignment kernel. Where one kernel does all iterations at once, it is here and in [`update`](Self::update).
    pub assign: &'static str,
    /// Rows of its tile: what a block works on at a time, or keeps for a whole fit.
    pub rows: usize,
    /// Centroids of its tile.
    pub centroids: usize,
    /// Whether the rows are first copied to where this kernel can read them.
    pub pack: bool,
    /// The update kernel. On the CPU, `cpu_line` leaves problems to the others whose values are not for it: not finite, or too far
    /// apart.
    pub update: &'static str,
    /// Upper bound on the memory of a fit beyond its input, in bytes, on the input's device: results, accumulators, and the
    /// scratch of the kernels and of the initialisation. A layout that must be copied adds one copy of the input.
    pub bytes: u64,
    /// The parts that the ops of the fit take.
    pub(crate) steps: Steps,
}

/// The parts of a plan that ops execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Steps {
    /// The layout that the plan was made for; none if what is given is not laid out in rows.
    pub given: Option<RowLayout>,
    /// That of the rows as ops read them, which have been packed by then if they have to be.
    pub layout: RowLayout,
    /// The kernel that does all iterations, which is asked before the others.
    pub on_chip: Option<OnChip>,
    pub assign: AssignPlan,
    pub update: UpdatePlan,
    pub skip: SkipPlan,
}

impl Plan {
    /// For rows that lie as `given`. `runs_at_once`: whether the device runs all blocks of this launch at once.
    pub(crate) fn new(
        p: &Problem,
        given: Option<RowLayout>,
        settings: &KMeans,
        arch: Arch,
        runs_at_once: impl FnOnce(&FitResident) -> Result<bool>,
    ) -> Result<Self> {
        let sizes = [p.b, p.n, p.k, p.d];
        let assign = |layout| AssignPlan::new(p.dtype, p.metric, sizes, p.b, layout, arch);
        // Tensors that do not lie in rows are copied, and it is not known yet to where.
        let unknown = RowLayout { alignment: 0, stride: p.d };
        let pack = assign(given.unwrap_or(unknown)).pack;
        let layout = match given {
            Some(given) if !pack => given,
            _ => RowLayout::packed(if pack { p.d.next_multiple_of(8) } else { p.d }),
        };
        let factors = settings.weights.is_some() || settings.lengths.is_some() || p.metric == Metric::Cosine;
        let watched = settings.on_iteration.is_some() || settings.empty == EmptyClusters::Relocate;
        let on_chip = match watched || skip::forced() {
            true => None,
            false => OnChip::new(p.dtype, p.metric, sizes, layout, factors, arch, runs_at_once)?,
        };
        let assign = assign(layout);
        let skip = SkipPlan::new(p, on_chip, assign.kernel, settings, arch);
        let update = UpdatePlan::new(p.dtype, sizes, layout, p.metric == Metric::Manhattan, factors, arch);
        let update = UpdatePlan { keep_sums: skip.keep_sums && skip.on_gpu, ..update };
        let steps = Steps { given, layout, on_chip, assign, update, skip };
        Ok(Self::from_steps(p, steps, pack, bytes(p, &steps, pack, settings, arch)))
    }

    /// The same for rows that are a block of several, whose assignments leave each other nothing.
    pub(crate) fn without_near(self, p: &Problem) -> Self {
        let near = self.steps.skip.near.map_or(0, |near| near.bytes(p));
        let skip = SkipPlan { near: None, ..self.steps.skip };
        Self { bytes: self.bytes - near, steps: Steps { skip, ..self.steps }, ..self }
    }

    /// The same fit without a kernel that does all iterations.
    pub(crate) fn without_on_chip(&self, p: &Problem) -> Self {
        Self::from_steps(p, Steps { on_chip: None, ..self.steps }, self.pack, self.bytes)
    }

    fn from_steps(p: &Problem, steps: Steps, pack: bool, bytes: u64) -> Self {
        let kernel = steps.assign.kernel;
        let (assign, update, (rows, centroids)) = match steps.on_chip {
            Some(fit) => (fit.name(), fit.name(), fit.tile(p.n, p.k)),
            None => (kernel.name(), steps.update.name(), kernel.tile(p.d)),
        };
        Self { assign, rows, centroids, pack, update, bytes, steps }
    }
}

/// Prints a plan if asked for and not yet printed.
pub(crate) fn announce(plan: &impl fmt::Display) {
    static SEEN: Mutex<Option<HashSet<String>>> = Mutex::new(None);
    if std::env::var_os("FLASH_KMEANS_PRINT_PLAN").is_some_and(|v| v == "1") {
        let (mut seen, plan) = (SEEN.lock().unwrap_or_else(|e| e.into_inner()), plan.to_string());
        if seen.get_or_insert_with(HashSet::new).insert(plan.clone()) {
            eprintln!("flash-kmeans: {plan}");
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { assign, rows, centroids, pack, update, bytes, steps } = self;
        let packed = if *pack { " on packed rows" } else { "" };
        match steps.on_chip {
            Some(_) => write!(f, "whole fit by {update}{packed} in tiles of {rows} x {centroids}")?,
            None => write!(f, "assign {assign}{packed} in tiles of {rows} x {centroids}, update {update}")?,
        }
        if steps.skip.near.is_some() {
            write!(f, ", later iterations assign to near groups of {} centroids", tiles::SKIP_GROUP)?;
        }
        write!(f, ", at most {:.1} MiB", *bytes as f64 / 1048576.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    /// The plan of f16 rows on an H100 whose blocks run at once, or do not.
    fn plan([n, k, d]: [usize; 3], given: RowLayout, at_once: bool) -> Plan {
        let arch = Arch::Cuda { capability: 90, processors: 132 };
        let p = Problem::of(&[n, d], DType::F16, k, Metric::default()).unwrap();
        Plan::new(&p, Some(given), &KMeans::new(k), arch, |_| Ok(at_once)).unwrap()
    }

    #[test]
    fn whole_fits_are_planned_where_they_run() {
        let names = |plan: Plan| (plan.assign, plan.update, plan.pack);
        let [aligned, odd] = [RowLayout::packed(32), RowLayout::packed(33)];
        // Rows of little work are read where they are, and these kernels cannot.
        assert_eq!(names(plan([1000, 16, 32], aligned, true)), ("fit_resident", "fit_resident", false));
        assert_eq!(names(plan([1000, 16, 32], aligned, false)), ("assign_simt_dot", "update", false));
        assert_eq!(names(plan([1000, 16, 32], odd, true)), ("assign_simt_dot", "update_narrow", false));
        // Packed rows are like aligned ones to what comes after.
        let [aligned, odd] = [RowLayout::packed(128), RowLayout::packed(129)];
        for (layout, pack) in [(aligned, false), (odd, true)] {
            assert_eq!(names(plan([2048, 64, 128], layout, true)), ("fit_resident", "fit_resident", pack));
            assert_eq!(names(plan([2048, 64, 128], layout, false)), ("assign_small", "update", pack));
        }
        let without = plan([2048, 64, 128], odd, true);
        let p = Problem::of(&[2048, 128], DType::F16, 64, Metric::default()).unwrap();
        assert_eq!(names(without.without_on_chip(&p)), ("assign_small", "update", true));
    }

    /// Near groups are planned where they pay and fit, or wherever they fit, and are in the text and the bytes of a plan.
    #[test]
    fn near_groups_are_planned_where_they_pay() {
        let arch = Arch::Cuda { capability: 90, processors: 132 };
        let plans_near = |shape: [usize; 3], dtype, settings: &KMeans, arch| {
            let p = Problem::of(&shape, dtype, settings.k, settings.metric).unwrap();
            let plan = Plan::new(&p, Some(RowLayout::packed(shape[2])), settings, arch, |_| Ok(true)).unwrap();
            let near = plan.steps.skip.near.is_some();
            assert_eq!(plan.to_string().contains("near groups of 64 centroids"), near);
            let without = plan.clone().without_near(&p);
            assert!(without.steps.skip.near.is_none() && (without.bytes < plan.bytes) == near);
            near
        };
        let (halves, many) = (DType::F16, KMeans::new(4096));
        for (shape, dtype) in [([1, 1 << 20, 128], halves), ([1, 1 << 21, 70], DType::BF16), ([1, 1 << 22, 33], halves)]
        {
            assert!(plans_near(shape, dtype, &many, arch), "{shape:?} {dtype:?}");
        }
        let shape = [1, 1 << 20, 128];
        for (shape, dtype, settings, arch) in [
            ([1, (1 << 20) - 1, 128], halves, many.clone(), arch),
            ([1, 1 << 20, 129], halves, many.clone(), arch),
            ([1, 1 << 28, 128], halves, many.clone(), arch),
            ([2, 1 << 20, 128], halves, many.clone(), arch),
            (shape, DType::F32, many.clone(), arch),
            ([1, 1 << 22, 128], halves, KMeans::new(2047), arch),
            (shape, halves, many.clone().max_iters(2), arch),
            (shape, halves, many.clone().metric(Metric::Dot), arch),
            (shape, halves, many.clone().empty_clusters(EmptyClusters::Relocate), arch),
            (shape, halves, many.clone(), Arch::Cuda { capability: 80, processors: 108 }),
            (shape, halves, many.clone(), Arch::CPU),
        ] {
            assert!(!plans_near(shape, dtype, &settings, arch), "{shape:?} {dtype:?} {settings:?}");
        }
        // Forced, they are made for any two groups, by a kernel for them.
        for (forced, k, near) in [(true, 128, true), (true, 127, false), (false, 2048, false)] {
            skip::force_skipping(Some(forced));
            assign::force(Some("assign_sm90"));
            assert_eq!(plans_near([1, 40_000, 8], halves, &KMeans::new(k), arch), near, "{k}");
            assign::force(None);
            skip::force_skipping(None);
        }
    }
}
