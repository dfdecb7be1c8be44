//! Labels by those groups of centroids alone that may have the nearest one of a row: `kernels/assign/near.cuh` says why none is lost.

use crate::{
    cuda::device::processors,
    cuda::kernel::{launch, WARP},
    cuda::memory::{Arena, ArenaLayout, Memory},
    cuda::params::{shape, Active, Bounds, NearState, UnprovenRow},
    cuda::sort::Sorting,
    cuda::tensors::{DevicePtr, Element, TensorMap},
    error::Result,
    plan::assign::sm90_shape,
    plan::skip::{NearGroups, NearSizes, NEAR_COLUMNS, NEAR_FIRST},
    request::Turn,
    rows::Rows,
    tiles::{HALVE_ROWS, HALVE_THREADS, MOVE_LANES, SKIP_GROUP, SM90_ROWS, SM90_SHARED, THREADS},
};
use candle_core::cuda_backend::{
    cudarc::driver::{CudaView, PushKernelArg},
    CudaDevice,
};
use std::mem::offset_of;

/// Rows and centroids as a pass over all centroids takes them, and what it writes.
pub(super) struct Scored<'a, T> {
    pub(super) x: (&'a CudaView<'a, T>, &'a Rows<'a>),
    pub(super) c: (&'a CudaView<'a, T>, &'a Rows<'a>),
    pub(super) active: Active,
    pub(super) mu: DevicePtr<T>,
    pub(super) moved: DevicePtr<T>,
    pub(super) search_start: DevicePtr<f32>,
    pub(super) own: DevicePtr<f32>,
    pub(super) bounds: DevicePtr<Bounds>,
    pub(super) padded: usize,
    pub(super) labels: DevicePtr<u32>,
    pub(super) list: DevicePtr<UnprovenRow>,
    pub(super) listed: DevicePtr<u32>,
}

/// What an assignment of a fit has from the one before it, and the memory that it works in, all in one allocation.
pub(super) struct Near<'a, T> {
    held: Arena<'a>,
    plan: NearGroups,
    sizes: NearSizes,
    /// Which assignment of the fit this is, counted from 1.
    t: usize,
    // From one assignment to the next: what is decided; the groups' centroids, the places of these in groups, and where they are now;
    // rows in their order; the labels before an assignment; centroids as they were; which groups are silent; slack; and the rows.
    state: DevicePtr<NearState>,
    members: DevicePtr<u32>,
    rank: DevicePtr<u32>,
    place: DevicePtr<u32>,
    order: DevicePtr<u32>,
    was: DevicePtr<u32>,
    last: DevicePtr<T>,
    silent: DevicePtr<u32>,
    slack: DevicePtr<f32>,
    rows: DevicePtr<T>,
    // In one assignment. Of these `arrived` is zeros between launches.
    arrived: DevicePtr<u32>,
    other_members: DevicePtr<u32>,
    keys: DevicePtr<u32>,
    row_places: DevicePtr<u32>,
    offsets: DevicePtr<u32>,
    sorting: Sorting,
    move_of: DevicePtr<f32>,
    group_move: DevicePtr<f32>,
    joined: DevicePtr<u32>,
    near_moved: DevicePtr<T>,
    near_start: DevicePtr<f32>,
    lists: DevicePtr<u32>,
    tile_order: DevicePtr<u32>,
}

impl<'a, T: Element> Near<'a, T> {
    /// Takes over from the last assignment of `n` rows of `d` columns to `k` centroids, or begins a fit. None in a capture that finds none of it.
    pub(super) fn new(
        dev: &CudaDevice,
        plan: NearGroups,
        [n, k, d]: [usize; 3],
        turn: Option<Turn<'_>>,
        memory: &'a Memory,
    ) -> Result<Option<Self>> {
        let t = turn.map_or(1, |turn| turn.iteration + 1);
        let sizes = NearGroups::sizes([n, k, d]);
        let &NearSizes { groups, all, places, tiles, list, pitch, .. } = &sizes;
        let mut layout = ArenaLayout::default();
        // The first, from where tests read it.
        let state = layout.unwritten(1);
        let [members, rank, place] = [places, k, k].map(|len| layout.unwritten(len));
        let [order, was, silent] = [n, n, groups].map(|len| layout.unwritten(len));
        let (last, slack) = (layout.unwritten(k * pitch), layout.unwritten(tiles * all));
        let rows = layout.unwritten(n * pitch);
        // Of the nodes of a level, and of a sort.
        let arrived = layout.unwritten(groups + 1);
        let [other_members, keys, row_places, offsets] = [k, k, n, k + 1].map(|len| layout.unwritten(len));
        let sorting = Sorting::new(&plan.sort, [1, n, k], &mut layout);
        let [move_of, group_move, near_start] = [k, groups, places].map(|len| layout.unwritten(len));
        let [joined, lists, tile_order] = [groups, tiles * list, tiles].map(|len| layout.unwritten(len));
        let near_moved = layout.unwritten(places * pitch);
        let Some(held) = layout.near(dev, "labels", memory, t == 1)? else { return Ok(None) };
        let near = Self {
            plan,
            t,
            state: held.ptr(state),
            members: held.ptr(members),
            rank: held.ptr(rank),
            place: held.ptr(place),
            order: held.ptr(order),
            was: held.ptr(was),
            last: held.ptr(last),
            silent: held.ptr(silent),
            slack: held.ptr(slack),
            rows: held.ptr(rows),
            arrived: held.ptr(arrived),
            other_members: held.ptr(other_members),
            keys: held.ptr(keys),
            row_places: held.ptr(row_places),
            offsets: held.ptr(offsets),
            sorting,
            move_of: held.ptr(move_of),
            group_move: held.ptr(group_move),
            joined: held.ptr(joined),
            near_moved: held.ptr(near_moved),
            near_start: held.ptr(near_start),
            lists: held.ptr(lists),
            tile_order: held.ptr(tile_order),
            held,
            sizes,
        };
        if t == 1 {
            near.state.clear(dev, 1)?;
            // Places without a centroid have a number that one has.
            near.members.clear(dev, near.sizes.places)?;
            near.arrived.clear(dev, near.sizes.groups + 1)?;
            near.silent.clear(dev, near.sizes.groups)?;
        }
        Ok(Some(near))
    }

    /// Labels rows by near groups if that is worth its while, which the device decides. Returns the problems that all centroids are to
    /// be scored of: this one or none.
    pub(super) fn assign(&self, dev: &CudaDevice, scored: &Scored<'_, T>) -> Result<Active> {
        let &Self { plan, t, ref sizes, state, .. } = self;
        let &Scored { x: (_, x), c: (cs, c), active, labels, .. } = scored;
        let (n, regroups) = (x.n as i64, NearGroups::regroups_at(t));
        if regroups {
            launch!(dev, Near, "near_changes", "", blocks(dev, x.n)?, THREADS; &labels, &self.was, &active, &n, &state)?;
        }
        if NearGroups::regroups_at(t + 1) {
            self.was.copy_from(dev, labels, x.n)?;
        }
        if t < NEAR_FIRST {
            return Ok(active);
        }
        launch!(dev, Near, "near_begin", "", 1, 1; &active, &n, &regroups, &plan.few(), &state)?;
        if regroups {
            self.regroup(dev, scored)?;
        }
        let (going, pitch, k) = (self.if_set(offset_of!(NearState, going)), sizes.pitch as i64, c.n as i64);
        let (groups, restless) = (sizes.groups as i64, sizes.restless as i64);
        launch!(dev, Near, "near_gather", T::SUFFIX, sizes.groups, SKIP_GROUP * MOVE_LANES;
            cs, &shape(c), &going, &self.members, &scored.moved, &scored.search_start, &pitch, &state, &self.last,
            &self.near_moved, &self.near_start, &self.move_of, &self.silent)?;
        launch!(dev, Near, "near_separate", T::SUFFIX, 1, WARP * WARP;
            &going, &k, &self.rank, &self.move_of, &groups, &restless, &pitch, &state, &self.near_moved,
            &self.near_start, &self.silent, &self.members, &self.place, &self.group_move, &self.joined)?;
        let (tiles, rows) = (sizes.tiles.min(8 * processors(dev)?), sizes.rows as i32);
        // A bit for each group, twice.
        let shared = 8 * sizes.all.div_ceil(32);
        launch!(dev, Near, "near_list", "", tiles, THREADS, shared;
            &labels, &self.order, &self.place, &self.move_of, &self.group_move, &self.joined, &going, &n, &groups,
            &restless, &rows, &plan.most(), &self.slack, &self.lists, &self.tile_order, &state)?;
        self.score(dev, scored)?;
        Ok(self.if_set(offset_of!(NearState, all)))
    }

    /// Groups the centroids that lie together, and brings the rows into the order of their groups, if the device has decided so.
    fn regroup(&self, dev: &CudaDevice, scored: &Scored<'_, T>) -> Result<()> {
        let &Self { ref sizes, members, other_members, arrived, row_places, .. } = self;
        let &Scored { x: (xs, x), c: (cs, c), labels, .. } = scored;
        let (regroup, n, pitch) = (self.if_set(offset_of!(NearState, regroup)), x.n as i64, sizes.pitch as i64);
        let levels = sizes.groups.next_power_of_two().ilog2();
        for level in 0..levels {
            let last = level + 1 == levels;
            // The last level writes to where members stay.
            let to_members = (levels - level) % 2 == 1;
            let (from, to) = if to_members { (other_members, members) } else { (members, other_members) };
            let from = if level == 0 { DevicePtr::NULL } else { from };
            let rank = if last { self.rank } else { DevicePtr::NULL };
            let blocks = c.n.div_ceil(HALVE_ROWS).min(processors(dev)?).max(1 << level);
            launch!(dev, Halve, "halve", T::SUFFIX, blocks, HALVE_THREADS;
                cs, &shape(c), &regroup, &(level as i32), &from, &to, &rank, &self.keys, &arrived)?;
        }
        launch!(dev, Near, "near_places", "", blocks(dev, x.n)?, THREADS; &labels, &self.rank, &regroup, &n, &row_places)?;
        let to = [arrived.from(sizes.groups), DevicePtr::NULL, self.order, self.offsets];
        self.sorting.run(dev, &self.held, row_places, regroup, to)?;
        launch!(dev, Near, "near_rows", T::SUFFIX, blocks(dev, x.n.saturating_mul(sizes.pitch / 8))?, THREADS;
            xs, &shape(x), &regroup, &self.order, &pitch, &self.rows)
    }

    /// Scores the groups that are listed, if the device has decided that these are few enough.
    fn score(&self, dev: &CudaDevice, scored: &Scored<'_, T>) -> Result<()> {
        let Self { sizes, .. } = self;
        let Some(half) = T::HALF else { return Ok(()) };
        let &Scored { x: (_, x), mu, own, bounds, padded, labels, list, listed, .. } = scored;
        let ((n, d), (steps, groups)) = ((x.n, x.d), sm90_shape(x.d));
        let (pitch, places) = (sizes.pitch, sizes.places);
        let row_map = TensorMap::new(half, self.rows.address, [1, n, d], [n * pitch, pitch], SM90_ROWS)?;
        let moved = self.near_moved.address;
        let map = TensorMap::new(half, moved, [1, places, d], [places * pitch, pitch], SKIP_GROUP)?;
        let ordered = Rows { batch_stride: n * pitch, row_stride: pitch, ..x.clone() };
        launch!(dev, AssignNearSm90, name(steps), T::SUFFIX, sizes.tiles.min(processors(dev)?), 128 * (groups + 1), SM90_SHARED;
            &row_map, &map, &shape(&ordered), &self.if_set(offset_of!(NearState, near)), &self.order, &self.members,
            &self.lists, &self.tile_order, &self.near_start, &own, &mu, &bounds, &(padded as i64), &(places as i64),
            &self.slack, &labels, &list, &listed)
    }

    /// The problem, if this count of the state says so.
    fn if_set(&self, offset: usize) -> Active {
        let count = DevicePtr::at(self.state.address + offset as u64);
        Active { list: DevicePtr::NULL, count, first: 0 }
    }
}

/// The blocks whose threads share `count` of something, each taking every so many.
fn blocks(dev: &CudaDevice, count: usize) -> Result<usize> {
    Ok(count.div_ceil(THREADS).min(16 * processors(dev)?))
}

/// The instance of `assign_near_sm90.cu` for so many steps of 16 columns.
fn name(steps: usize) -> &'static str {
    const NAMES: [&str; NEAR_COLUMNS / 16] = [
        "assign_near_1",
        "assign_near_2",
        "assign_near_3",
        "assign_near_4",
        "assign_near_5",
        "assign_near_6",
        "assign_near_7",
        "assign_near_8",
    ];
    NAMES[steps - 1]
}

/// The groups that the tiles of rows have scored in all when near groups were listed for the last time; none if there are no groups, or
/// all centroids were scored since. The host waits. For tests.
pub(crate) fn scored_groups(memory: &Memory) -> Result<Option<u64>> {
    let mut bytes = [0; size_of::<NearState>()];
    let known = memory.read_near(&mut bytes)?;
    let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
    let (on, listed) = (offset_of!(NearState, on), offset_of!(NearState, last_listed));
    Ok((known && word(on) > 0).then(|| u64::from(word(listed)) | u64::from(word(listed + 4)) << 32))
}
