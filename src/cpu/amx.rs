//! AMX, the matrix unit of some x86 processors: products of bf16, and of bytes, in tiles of registers (Intel, Architecture Instruction Set Extensions
//! Programming Reference, chapter 3). Rust has no stable intrinsics for it, but stable inline assembly.

mod vectors;

use super::lines::{pair_lines, ByteLine, Ends, PairRows, TileEnds, BYTE_TILE, PAIR, SLICES, TILE};
use crate::kept::Line;
use raw_cpuid::CpuId;
use std::{arch::asm, cell::Cell, marker::PhantomData, sync::OnceLock};

/// The unit, which whoever has this may use, with AVX-512.
#[derive(Clone, Copy)]
pub(super) struct Amx(());

/// Eight tiles of 16 rows of 64 bytes: palette 1, which has no others.
#[repr(C, align(64))]
struct Config([u8; 64]);

static CONFIG: Config = {
    let (mut config, mut tile) = ([0; 64], 0);
    config[0] = 1;
    while tile < 8 {
        (config[16 + 2 * tile], config[48 + tile]) = (64, 16);
        tile += 1;
    }
    Config(config)
};

impl Amx {
    /// The unit, if this processor has it and this process may use it.
    pub(super) fn find() -> Option<Self> {
        static FOUND: OnceLock<bool> = OnceLock::new();
        let found = || is_x86_feature_detected!("avx512f") && has_tiles() && permitted();
        FOUND.get_or_init(found).then_some(Self(()))
    }

    /// The least of the scores of a row, of whole tiles.
    #[inline(always)]
    pub(super) fn lowest(self, scores: &[f32]) -> f32 {
        // SAFETY: this was made where AVX-512 is.
        unsafe { vectors::lowest(scores) }
    }

    /// Calls `keep` with each of these scores that is at most `cut`, and its place, until one returns false, and returns that.
    #[inline(always)]
    pub(super) fn all_at_most(self, scores: &[f32], cut: f32, keep: impl FnMut(usize, f32) -> bool) -> bool {
        // SAFETY: as above.
        unsafe { vectors::all_at_most(scores, cut, keep) }
    }

    /// The place of the one of these scores that is at most `cut`, if there is one and no other.
    #[inline(always)]
    pub(super) fn only_at_most(self, scores: &[f32], cut: f32) -> Option<usize> {
        // SAFETY: as above.
        unsafe { vectors::only_at_most(scores, cut) }
    }

    /// Distances of some rows of a tile and a tile of centroids by the levels of their products, from below, to rows of `out`; calls `open` with a
    /// row and those of its columns, as bits, where the distance from above is another f32.
    #[inline(always)]
    pub(super) fn distances(
        self,
        levels: &[i32],
        (rows, centroids): (&[Ends], &TileEnds),
        (out, stride): (&mut [f32], usize),
        open: impl FnMut(usize, u32),
    ) {
        // SAFETY: as above.
        unsafe { vectors::distances(levels, (rows, centroids), (out, stride), open) }
    }

    /// Configures the registers of this thread as tiles. Who multiplies often does this once: it takes as long as a small product.
    ///
    /// # Panics
    /// If the thread has tiles.
    pub(super) fn tiles(self) -> Tiles {
        assert!(!CONFIGURED.replace(true), "a thread has the unit's tiles once");
        // SAFETY: an `Amx` is made only where the unit is there, and the address is that of a configuration. Tile registers are in their initial
        // state before, and nothing but what takes these `Tiles` uses them until they are dropped, on this thread.
        unsafe { asm!("ldtilecfg [{config}]", config = in(reg) &CONFIG, options(nostack, readonly)) }
        Tiles(PhantomData)
    }
}

thread_local!(static CONFIGURED: Cell<bool> = const { Cell::new(false) });

/// The unit's registers, of this thread alone, until this is dropped.
pub(super) struct Tiles(PhantomData<*mut ()>);

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: there is a unit, or there would be no tiles. Their registers are left in their initial state, as the process had them.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
        CONFIGURED.set(false);
    }
}

impl Tiles {
    /// `out[i][j] = bias[j] + row_i . centroid_j` for a pair of tiles of rows and as many centroids as there are biases, in whole tiles; `centroids` are
    /// in whole pairs.
    pub(super) fn product(
        &mut self,
        rows: PairRows<'_>,
        centroids: &[Line],
        bias: &[f32],
        steps: usize,
        out: &mut [f32],
    ) {
        product(rows, centroids, bias, steps, out)
    }

    /// Levels of the products of a tile of rows and a tile of centroids, row by row each: sums of the products of all slices `i` and `j` of them with
    /// the same `i + j`. Both have tiles of all slices for each step.
    pub(super) fn byte_levels(&mut self, rows: &[ByteLine], centroids: &[ByteLine], out: &mut [i32]) {
        byte_levels(rows, centroids, out)
    }
}

/// Asks the processor for tiles of bf16 and of bytes.
fn has_tiles() -> bool {
    let features = CpuId::new().get_extended_feature_info();
    features.is_some_and(|features| features.has_amx_tile() && features.has_amx_bf16() && features.has_amx_int8())
}

/// Asks Linux for the registers' state, which a process has only on request, and only where the system saves them with the others.
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers and touches no memory of ours. Where it is unknown it fails.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
}

/// The arguments of a product, which lie in memory, since registers are few.
#[repr(C)]
struct ProductArgs {
    /// Both tiles of rows.
    rows: [*const Line; 2],
    /// From one step of them to the next, in bytes.
    step_bytes: usize,
    steps: usize,
    /// Tiles of centroids that are no pair.
    left: usize,
}

fn product(rows: PairRows<'_>, centroids: &[Line], bias: &[f32], steps: usize, out: &mut [f32]) {
    let (pairs, tiles, lines) = (bias.len() / PAIR, bias.len() / TILE, pair_lines(steps));
    assert!(steps > 0 && tiles > 0 && bias.len() == tiles * TILE);
    assert!(centroids.len() == tiles.div_ceil(2) * lines && out.len() == PAIR * bias.len());
    let [upper, lower] = [0, TILE].map(|row| &rows.lines[row * rows.row..]);
    assert!((TILE - 1) * rows.row + (steps - 1) * rows.step < lower.len());
    let args = ProductArgs {
        rows: [upper.as_ptr(), lower.as_ptr()],
        step_bytes: rows.step * size_of::<Line>(),
        steps,
        left: tiles % 2,
    };
    let row_bytes = 4 * bias.len();
    // SAFETY: `Tiles` call this, whose registers are configured. They are loaded from a line of each of 32 `rows` a step, of which the last is that of the
    // last row and step, once for each pair of centroids; of `centroids`, 2,048 bytes a step and pair; and from 128 bytes of `bias` a pair, sixteen
    // times the same (no index: a stride of 0). They are stored to 128 bytes of each of the 32 rows of `out` a pair. A single tile at the end takes
    // the first half of each of these. That is within the slices, as asserted. `args` is read as it is declared. The block touches no register but
    // tiles and those that are named.
    unsafe {
        asm!(
            "test {pairs}, {pairs}",
            "jz 4f",
            "2:",
            "mov {row}, [{args}]",
            "mov {lower_row}, [{args} + 8]",
            "mov {step}, [{args} + 24]",
            "tileloadd tmm0, [{bias}]",
            "tileloadd tmm1, [{bias} + 64]",
            "tileloadd tmm2, [{bias}]",
            "tileloadd tmm3, [{bias} + 64]",
            "3:",
            "tileloadd tmm4, [{row} + {row_line}*1]",
            "tileloadd tmm6, [{centroid} + {line}*1]",
            "tileloadd tmm7, [{centroid} + {line}*1 + 1024]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{lower_row} + {row_line}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {row}, [{args} + 16]",
            "add {lower_row}, [{args} + 16]",
            "add {centroid}, 2048",
            "dec {step}",
            "jnz 3b",
            "tilestored [{out} + {row_bytes}*1], tmm0",
            "tilestored [{out} + {row_bytes}*1 + 64], tmm1",
            "tilestored [{lower} + {row_bytes}*1], tmm2",
            "tilestored [{lower} + {row_bytes}*1 + 64], tmm3",
            "add {out}, 128",
            "add {lower}, 128",
            "add {bias}, 128",
            "dec {pairs}",
            "jnz 2b",
            "4:",
            "cmp qword ptr [{args} + 32], 0",
            "jz 6f",
            "mov {row}, [{args}]",
            "mov {lower_row}, [{args} + 8]",
            "mov {step}, [{args} + 24]",
            "tileloadd tmm0, [{bias}]",
            "tileloadd tmm2, [{bias}]",
            "5:",
            "tileloadd tmm4, [{row} + {row_line}*1]",
            "tileloadd tmm6, [{centroid} + {line}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{lower_row} + {row_line}*1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "add {row}, [{args} + 16]",
            "add {lower_row}, [{args} + 16]",
            "add {centroid}, 2048",
            "dec {step}",
            "jnz 5b",
            "tilestored [{out} + {row_bytes}*1], tmm0",
            "tilestored [{lower} + {row_bytes}*1], tmm2",
            "6:",
            row = out(reg) _,
            lower_row = out(reg) _,
            centroid = inout(reg) centroids.as_ptr() => _,
            bias = inout(reg) bias.as_ptr() => _,
            line = in(reg) size_of::<Line>(),
            row_line = in(reg) rows.row * size_of::<Line>(),
            args = in(reg) &args,
            step = out(reg) _,
            pairs = inout(reg) pairs => _,
            lower = inout(reg) out[PAIR / 2 * bias.len()..].as_mut_ptr() => _,
            out = inout(reg) out.as_mut_ptr() => _,
            row_bytes = in(reg) row_bytes,
            options(nostack),
        );
    }
}

/// Asks for the next 512 bytes of centroids.
macro_rules! ahead {
    () => {
        concat!(
            "prefetcht0 [{ahead}]\nprefetcht0 [{ahead} + 64]\nprefetcht0 [{ahead} + 128]\nprefetcht0 [{ahead} + 192]\n",
            "prefetcht0 [{ahead} + 256]\nprefetcht0 [{ahead} + 320]\nprefetcht0 [{ahead} + 384]\nprefetcht0 [{ahead} + 448]\n",
            "add {ahead}, 512"
        )
    };
}

fn byte_levels(rows: &[ByteLine], centroids: &[ByteLine], out: &mut [i32]) {
    let steps = rows.len() / (SLICES * BYTE_TILE);
    assert!(steps > 0 && rows.len() == steps * SLICES * BYTE_TILE && centroids.len() == rows.len());
    assert!(out.len() == SLICES * BYTE_TILE * BYTE_TILE && SLICES == 5);
    // SAFETY: `Tiles` call this, whose registers are configured. Each step loads from 5,120 bytes of `rows` and of `centroids`, five tiles of 1,024, and goes on to
    // the next. Five tiles are stored to 1,024 bytes each of `out`. These are all the bytes that the slices have, as asserted; what is asked for
    // ahead of its turn may lie behind `centroids`, which is a hint that cannot fault. The block touches no register but tiles and those that
    // are named.
    //
    // Loads take longer than products: two slices of the rows stay in tmm5 and tmm6 while those of the centroids come and go in tmm7, and twelve
    // loads are enough for fifteen products. A sum of a level, in tmm0 to tmm4, waits for the one before, which takes as long as three products:
    // so those of the last level, of which there are most, are apart.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "tilezero tmm4",
            "2:",
            "tileloadd tmm5, [{row} + {line}*1]",
            "tileloadd tmm7, [{centroid} + {line}*1 + 1024]",
            "tdpbssd tmm1, tmm5, tmm7",
            ahead!(),
            "tileloadd tmm6, [{row} + {line}*1 + 1024]",
            "tdpbssd tmm2, tmm6, tmm7",
            "tileloadd tmm7, [{centroid} + {line}*1 + 4096]",
            ahead!(),
            "tdpbssd tmm4, tmm5, tmm7",
            "tileloadd tmm7, [{centroid} + {line}*1]",
            "tdpbssd tmm0, tmm5, tmm7",
            ahead!(),
            "tdpbssd tmm1, tmm6, tmm7",
            "tileloadd tmm7, [{centroid} + {line}*1 + 3072]",
            ahead!(),
            "tdpbssd tmm3, tmm5, tmm7",
            "tdpbssd tmm4, tmm6, tmm7",
            ahead!(),
            "tileloadd tmm7, [{centroid} + {line}*1 + 2048]",
            "tdpbssd tmm2, tmm5, tmm7",
            ahead!(),
            "tdpbssd tmm3, tmm6, tmm7",
            "tileloadd tmm5, [{row} + {line}*1 + 2048]",
            ahead!(),
            "tdpbssd tmm4, tmm5, tmm7",
            "tileloadd tmm7, [{centroid} + {line}*1 + 1024]",
            "tdpbssd tmm3, tmm5, tmm7",
            ahead!(),
            "tileloadd tmm6, [{row} + {line}*1 + 3072]",
            "tdpbssd tmm4, tmm6, tmm7",
            ahead!(),
            "tileloadd tmm7, [{centroid} + {line}*1]",
            "tdpbssd tmm2, tmm5, tmm7",
            "tdpbssd tmm3, tmm6, tmm7",
            ahead!(),
            "tileloadd tmm5, [{row} + {line}*1 + 4096]",
            "tdpbssd tmm4, tmm5, tmm7",
            "add {row}, 5120",
            "add {centroid}, 5120",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{out} + {line}*1], tmm0",
            "tilestored [{out} + {line}*1 + 1024], tmm1",
            "tilestored [{out} + {line}*1 + 2048], tmm2",
            "tilestored [{out} + {line}*1 + 3072], tmm3",
            "tilestored [{out} + {line}*1 + 4096], tmm4",
            row = inout(reg) rows.as_ptr() => _,
            centroid = inout(reg) centroids.as_ptr() => _,
            ahead = inout(reg) centroids.as_ptr().wrapping_add(SLICES * BYTE_TILE) => _,
            line = in(reg) size_of::<ByteLine>(),
            steps = inout(reg) steps => _,
            out = in(reg) out.as_mut_ptr(),
            options(nostack),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::lines::{rows_lines, steps, write_centroid, write_row, FLUSHED, STEP, STEP_UNITS},
        *,
    };
    use half::bf16;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use std::array::from_fn;

    /// The unit; tests of it say where it is not here.
    fn unit() -> Option<Amx> {
        let unit = Amx::find();
        if unit.is_none() {
            eprintln!("this machine has no matrix unit, or its system does not lend it: nothing is tested here");
        }
        unit
    }

    fn tiles(
        values: &[Vec<bf16>],
        of_pair: usize,
        write: impl Fn(&mut [Line], usize, usize, [u16; STEP]),
    ) -> Vec<Line> {
        let mut lines = vec![Line::ZERO; values.len().div_ceil(PAIR) * of_pair];
        for (i, row) in values.iter().enumerate() {
            let pair = &mut lines[i / PAIR * of_pair..][..of_pair];
            for (step, values) in row.chunks(STEP).enumerate() {
                write(pair, i % PAIR, step, from_fn(|i| values.get(i).map_or(0, |v| v.to_bits())));
            }
        }
        lines
    }

    /// Scores of 32 rows against centroids, each with its bias.
    fn scores(unit: Amx, rows: &[Vec<bf16>], centroids: &[Vec<bf16>], bias: &[f32]) -> Vec<f32> {
        let mut out = vec![f32::NAN; PAIR * bias.len()];
        let steps = steps(rows[0].len());
        let rows = tiles(rows, rows_lines(steps), write_row);
        unit.tiles().product(
            PairRows::of_pair(&rows),
            &tiles(centroids, pair_lines(steps), write_centroid),
            bias,
            steps,
            &mut out,
        );
        out
    }

    fn matrix(n: usize, mut value: impl FnMut(usize) -> Vec<f32>) -> Vec<Vec<bf16>> {
        (0..n).map(|i| value(i).into_iter().map(bf16::from_f32).collect()).collect()
    }

    /// Products of whole numbers, which are exact.
    #[test]
    fn every_place_of_a_product() {
        let Some(unit) = unit() else { return };
        for (d, k) in
            [(1, 32), (31, 32), (32, 64), (33, 96), (64, 256), (100, 32), (257, 64), (1, 16), (40, 48), (96, 80)]
        {
            let rows = matrix(PAIR, |i| (0..d).map(|col| ((i * 7 + col * 3) % 11) as f32 - 5.0).collect());
            let centroids = matrix(k, |j| (0..d).map(|col| ((j * 5 + col * 2) % 13) as f32 - 6.0).collect());
            let bias: Vec<f32> = (0..k).map(|j| j as f32 * 0.5).collect();
            let got = scores(unit, &rows, &centroids, &bias);
            for (i, row) in rows.iter().enumerate() {
                for (j, centroid) in centroids.iter().enumerate() {
                    let product: f32 = row.iter().zip(centroid).map(|(a, b)| a.to_f32() * b.to_f32()).sum();
                    assert_eq!(got[i * k + j], bias[j] + product, "row {i}, centroid {j}, {d} columns");
                }
            }
        }
    }

    /// The score of 32 terms from a start.
    fn one(unit: Amx, start: f32, terms: impl Fn(usize) -> (f32, f32)) -> f32 {
        let row = |side: &dyn Fn(usize) -> f32| matrix(PAIR, |_| (0..STEP).map(side).collect());
        scores(unit, &row(&|i| terms(i).0), &row(&|i| terms(i).1), &[start; PAIR])[0]
    }

    #[test]
    fn sums_round_as_the_bound_assumes() {
        let Some(unit) = unit() else { return };
        let one = |start, terms: &dyn Fn(usize) -> (f32, f32)| one(unit, start, terms);
        let (tiny, ulps) = ((2f32.powi(-12), 2f32.powi(-13)), 2f32.powi(-20));
        // Chains start from zero: 32 terms of 2^-25 are whole before they meet a 1, and half of them are lost behind a 1 in their chain.
        assert_eq!(one(1.0, &|_| tiny), 1.0 + ulps);
        assert_eq!(one(0.0, &|i| if i == 0 { (1.0, 1.0) } else { tiny }), 1.0 + ulps / 2.0);
        assert_eq!(one(0.0, &|i| if i == 31 { (1.0, 1.0) } else { tiny }), 1.0 + ulps * 31.0 / 32.0);
        assert_eq!(
            one(1.0, &|i| if i == 0 { (3.0 * tiny.0, tiny.1) } else { (0.0, 0.0) }),
            1.0 + f32::EPSILON,
            "to nearest"
        );
        // Numbers below the least normal one are zeros: a result, an input, a start.
        let only = |a: f32, b: f32| move |i| if i == 0 { (a, b) } else { (0.0, 0.0) };
        assert_eq!(one(0.0, &only(2f32.powi(-70), 2f32.powi(-70))), 0.0);
        assert_eq!(one(0.0, &only(2f32.powi(-130), 2f32.powi(20))), 0.0);
        assert_eq!(one(2f32.powi(-140), &only(0.0, 0.0)), 0.0);
        // Random terms of many magnitudes, in units of the bound of a step.
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for _ in 0..2000 {
            let terms: Vec<(f32, f32)> = (0..STEP)
                .map(|_| {
                    let mut term = || rng.random_range(-1.0f32..1.0) * 2f32.powi(rng.random_range(-12..12));
                    (bf16::from_f32(term()).to_f32(), bf16::from_f32(term()).to_f32())
                })
                .collect();
            let start = rng.random_range(-1.0f32..1.0) * 2f32.powi(rng.random_range(-24..24));
            let products = || terms.iter().map(|&(a, b)| f64::from(a) * f64::from(b));
            let (exact, sizes) = (f64::from(start) + products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
            let bound =
                2f64.powi(-24) * (STEP_UNITS as f64 * sizes + f64::from(start.abs())) + 2.0 * STEP as f64 * FLUSHED;
            let got = f64::from(one(start, &|i| terms[i]));
            assert!((got - exact).abs() <= bound, "{got:e} for {exact:e}, {bound:e} is allowed");
        }
    }

    #[test]
    fn scores_are_searched_as_one_by_one() {
        let Some(unit) = unit() else { return };
        let mut rng = ChaCha8Rng::seed_from_u64(8);
        for width in [32, 64, 96, 256] {
            let mut scores: Vec<f32> = (0..width).map(|_| rng.random_range(-9i8..9).into()).collect();
            scores[width - 1] = f32::INFINITY;
            let lowest = |scores: &[f32]| scores.iter().copied().fold(f32::INFINITY, f32::min);
            let least = lowest(&scores);
            assert_eq!(unit.lowest(&scores), least);
            assert_eq!(unit.lowest(&scores[16..]), lowest(&scores[16..]));
            for cut in [least - 1.0, least, 0.0, 100.0, f32::INFINITY] {
                let want: Vec<_> = scores.iter().copied().enumerate().filter(|&(_, score)| score <= cut).collect();
                let mut got = vec![];
                let all = unit.all_at_most(&scores, cut, |i, score| {
                    got.push((i, score));
                    got.len() < 20
                });
                assert_eq!((got.as_slice(), all), (&want[..want.len().min(20)], want.len() < 20), "{width}, {cut}");
                let only = if let [(i, _)] = want[..] { Some(i) } else { None };
                assert_eq!(unit.only_at_most(&scores, cut), only, "{width}, {cut}");
            }
        }
    }

    /// Bit by bit as one by one, and open where nothing is known.
    #[test]
    fn levels_become_distances_as_one_by_one() {
        let Some(unit) = unit() else { return };
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let mut ends = |wide: f64| {
            let middle = rng.random_range(0.0..9.0);
            Ends { low: middle - wide, high: middle + wide, factor: 0.5f64.powi(rng.random_range(9..12)) }
        };
        let mut rows: Vec<_> = (0..BYTE_TILE).map(|i| ends(if i % 3 == 0 { 1e-6 } else { 1e-12 })).collect();
        let mut centroids: [Ends; BYTE_TILE] = from_fn(|_| ends(1e-12));
        (rows[5], centroids[7]) = (Ends::UNKNOWN, Ends::UNKNOWN);
        let levels: Vec<i32> =
            (0..SLICES * BYTE_TILE * BYTE_TILE).map(|_| rng.random_range(-1i32 << 20..1 << 20)).collect();
        for count in [1, 7, BYTE_TILE] {
            let (stride, mut differ) = (BYTE_TILE + 3, [0; BYTE_TILE]);
            let mut out = vec![f32::NAN; count * stride];
            let tile = TileEnds::new(centroids);
            unit.distances(&levels, (&rows[..count], &tile), (&mut out, stride), |i, open| differ[i] = open);
            for (i, row) in rows[..count].iter().enumerate() {
                for (j, centroid) in centroids.iter().enumerate() {
                    let level = |level: usize| f64::from(levels[(level * BYTE_TILE + i) * BYTE_TILE + j]);
                    let sum = (0..SLICES).rev().fold(0.0, |sum: f64, next| sum.mul_add(1.0 / 256.0, level(next)));
                    let product = sum * row.factor;
                    let low = (-product).mul_add(centroid.factor, row.low + centroid.low) as f32;
                    let high = (-product).mul_add(centroid.factor, row.high + centroid.high) as f32;
                    assert_eq!(out[i * stride + j].to_bits(), low.to_bits(), "{i} {j}");
                    assert_eq!(differ[i] >> j & 1 == 1, low.to_bits() != high.to_bits(), "{i} {j}");
                    assert!(i != 5 && j != 7 || low.to_bits() != high.to_bits(), "{i} {j}");
                }
            }
        }
    }
}
