//! Levels that codes name, looked up sixteen at a time, with what the processor has.
//!
//! The codes of two blocks of 64 columns are sixteen numbers of eight fields (`LutMatrix` in `request.rs`). The fields at one place of all numbers
//! are sixteen codes, for which the instructions that permute a register by indices find sixteen levels at once: a table of sixteen numbers of
//! f32 fills one register of AVX-512, and two of AVX2.

use crate::request::LutMatrix;
use half::f16;
#[cfg(target_arch = "x86_64")]
use pulp::{
    cast,
    x86::{V3, V4},
};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m128i, __m256, __m256i, __m512, __m512i};

/// Numbers of a block.
pub(super) const NUMBERS: usize = 8;
/// Fields of a number.
pub(super) const FIELDS: usize = 8;
/// Codes that are looked up at once: a field of the numbers of two blocks.
pub(super) const LANES: usize = 2 * NUMBERS;
/// Columns of two blocks.
pub(super) const PAIR: usize = 2 * LutMatrix::BLOCK;
/// Levels of a table, which repeats itself where codes are of fewer bits.
pub(super) const LEVELS: usize = 16;

/// The numbers of a pair of blocks. Moved down by a field's place, each has the field's code in its low bits, and above it the fields that follow,
/// which look-ups pass over. Codes of three bits have two in `fields`; the third is in `thirds`, two places up.
#[derive(Clone, Copy)]
pub(super) struct Numbers<C> {
    fields: C,
    thirds: C,
}

/// The bits of a half, moved to where an f32 has them, stand for a number that is smaller by this factor: the exponents of the two begin 112 apart.
const UP: f32 = f32::from_bits((127 + 112) << 23);

/// A finite number, as `f16::to_f32` has it, in three operations on vectors and no call.
#[inline(always)]
pub(super) fn number(v: f16) -> f32 {
    let bits = u32::from(v.to_bits());
    f32::from_bits((bits & 0x7fff) << 13 | (bits & 0x8000) << 16) * UP
}

/// Two halves of an array.
#[inline(always)]
fn joined<const N: usize>(a: &[u8], b: &[u8]) -> [u8; N] {
    let mut both = [0; N];
    both[..N / 2].copy_from_slice(a);
    both[N / 2..].copy_from_slice(b);
    both
}

/// A kind of processor.
pub(super) trait Lanes: Copy {
    /// [`LANES`] numbers of f32, and of u32.
    type Floats: Copy;
    type Codes: Copy;

    fn load(self, from: &[f32; LANES]) -> Self::Floats;
    /// Finite numbers.
    fn finite(self, from: [f16; LANES]) -> Self::Floats;
    fn store(self, from: Self::Floats, to: &mut [f32; LANES]);
    /// One number for each block of a pair.
    fn of_blocks(self, blocks: [f32; 2]) -> Self::Floats;
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn mul_add(self, a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// Numbers of 32, 16 and 8 bits, the low byte first.
    fn words(self, from: [u8; 4 * LANES]) -> Self::Codes;
    fn halves(self, from: [u8; 2 * LANES]) -> Self::Codes;
    fn bytes(self, from: [u8; LANES]) -> Self::Codes;
    /// Each number moved by so many bits.
    fn up(self, codes: Self::Codes, bits: u32) -> Self::Codes;
    fn down(self, codes: Self::Codes, bits: u32) -> Self::Codes;
    /// The low two bits of `twos` below the other bits of `rest`.
    fn with_rest(self, twos: Self::Codes, rest: Self::Codes) -> Self::Codes;
    /// The levels that codes name: by their low four bits, or three where tables are not `WIDE` and say the same twice. The blocks of a pair
    /// have each its own table if these are `APART`, or else the first.
    fn look_up<const WIDE: bool, const APART: bool>(
        self,
        tables: [Self::Floats; 2],
        codes: Self::Codes,
    ) -> Self::Floats;

    /// The sum of all, in a tree, so that few additions wait for others.
    #[inline(always)]
    fn sum(self, of: Self::Floats) -> f32 {
        let mut sums = [0.0; LANES];
        self.store(of, &mut sums);
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                sums[lane] += sums[lane + width];
            }
        }
        sums[0]
    }

    /// A table of levels.
    #[inline(always)]
    fn table<const BITS: usize>(self, levels: &[f16]) -> Self::Floats {
        let levels = &levels[..1 << BITS];
        self.finite(std::array::from_fn(|entry| levels[entry % (1 << BITS)]))
    }

    /// The numbers of a pair of blocks, of `16 * BITS` bytes.
    #[inline(always)]
    fn numbers<const BITS: usize>(self, pair: &[u8]) -> Numbers<Self::Codes> {
        let none = || self.bytes([0; LANES]);
        let (a, b) = pair.split_at(NUMBERS * BITS);
        match BITS {
            4 => Numbers { fields: self.words(joined(a, b)), thirds: none() },
            3 => {
                let ((a, a_thirds), (b, b_thirds)) = (a.split_at(2 * NUMBERS), b.split_at(2 * NUMBERS));
                let thirds = self.up(self.bytes(joined(a_thirds, b_thirds)), 2);
                Numbers { fields: self.halves(joined(a, b)), thirds }
            }
            _ => Numbers { fields: self.halves(joined(a, b)), thirds: none() },
        }
    }

    /// The levels of the codes in a field.
    #[inline(always)]
    fn levels<const BITS: usize, const APART: bool>(
        self,
        tables: [Self::Floats; 2],
        numbers: &Numbers<Self::Codes>,
        field: usize,
    ) -> Self::Floats {
        let field = field as u32;
        match BITS {
            4 => self.look_up::<true, APART>(tables, self.down(numbers.fields, 4 * field)),
            3 => {
                let thirds = self.down(numbers.thirds, field);
                self.look_up::<false, APART>(tables, self.with_rest(self.down(numbers.fields, 2 * field), thirds))
            }
            _ => self.look_up::<false, APART>(tables, self.down(numbers.fields, 2 * field)),
        }
    }
}

/// Any processor.
#[derive(Clone, Copy)]
pub(super) struct Plain;

impl Lanes for Plain {
    type Floats = [f32; LANES];
    type Codes = [u32; LANES];

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::Floats {
        *from
    }

    #[inline(always)]
    fn finite(self, from: [f16; LANES]) -> Self::Floats {
        from.map(number)
    }

    #[inline(always)]
    fn store(self, from: Self::Floats, to: &mut [f32; LANES]) {
        *to = from;
    }

    #[inline(always)]
    fn of_blocks(self, blocks: [f32; 2]) -> Self::Floats {
        std::array::from_fn(|lane| blocks[lane / NUMBERS])
    }

    #[inline(always)]
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        std::array::from_fn(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    fn mul_add(self, a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        std::array::from_fn(|lane| a[lane] * b[lane] + c[lane])
    }

    #[inline(always)]
    fn words(self, from: [u8; 4 * LANES]) -> Self::Codes {
        std::array::from_fn(|lane| u32::from_le_bytes(std::array::from_fn(|i| from[4 * lane + i])))
    }

    #[inline(always)]
    fn halves(self, from: [u8; 2 * LANES]) -> Self::Codes {
        std::array::from_fn(|lane| u16::from_le_bytes([from[2 * lane], from[2 * lane + 1]]).into())
    }

    #[inline(always)]
    fn bytes(self, from: [u8; LANES]) -> Self::Codes {
        from.map(u32::from)
    }

    #[inline(always)]
    fn up(self, codes: Self::Codes, bits: u32) -> Self::Codes {
        codes.map(|code| code << bits)
    }

    #[inline(always)]
    fn down(self, codes: Self::Codes, bits: u32) -> Self::Codes {
        codes.map(|code| code >> bits)
    }

    #[inline(always)]
    fn with_rest(self, twos: Self::Codes, rest: Self::Codes) -> Self::Codes {
        std::array::from_fn(|lane| twos[lane] & 3 | rest[lane] & !3)
    }

    #[inline(always)]
    fn look_up<const WIDE: bool, const APART: bool>(
        self,
        tables: [Self::Floats; 2],
        codes: Self::Codes,
    ) -> Self::Floats {
        let table = |lane: usize| if APART { &tables[lane / NUMBERS] } else { &tables[0] };
        std::array::from_fn(|lane| table(lane)[codes[lane] as usize % if WIDE { LEVELS } else { LEVELS / 2 }])
    }
}

#[cfg(target_arch = "x86_64")]
impl Lanes for V3 {
    type Floats = [__m256; 2];
    type Codes = [__m256i; 2];

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::Floats {
        cast(*from)
    }

    #[inline(always)]
    fn finite(self, from: [f16; LANES]) -> Self::Floats {
        let halves: [__m128i; 2] = cast(from.map(f16::to_bits));
        let (signs, up) = (self.avx._mm256_set1_epi32(i32::MIN), self.avx._mm256_set1_ps(UP));
        halves.map(|half| {
            let bits = self.avx2._mm256_cvtepu16_epi32(half);
            let sign = self.avx2._mm256_and_si256(self.avx2._mm256_slli_epi32::<16>(bits), signs);
            let rest = self.avx2._mm256_srli_epi32::<4>(self.avx2._mm256_slli_epi32::<17>(bits));
            self.avx._mm256_mul_ps(cast(self.avx2._mm256_or_si256(sign, rest)), up)
        })
    }

    #[inline(always)]
    fn store(self, from: Self::Floats, to: &mut [f32; LANES]) {
        *to = cast(from);
    }

    #[inline(always)]
    fn of_blocks(self, blocks: [f32; 2]) -> Self::Floats {
        blocks.map(|block| self.avx._mm256_set1_ps(block))
    }

    #[inline(always)]
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        std::array::from_fn(|half| self.avx._mm256_mul_ps(a[half], b[half]))
    }

    #[inline(always)]
    fn mul_add(self, a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        std::array::from_fn(|half| self.fma._mm256_fmadd_ps(a[half], b[half], c[half]))
    }

    #[inline(always)]
    fn words(self, from: [u8; 4 * LANES]) -> Self::Codes {
        cast(from)
    }

    #[inline(always)]
    fn halves(self, from: [u8; 2 * LANES]) -> Self::Codes {
        let halves: [__m128i; 2] = cast(from);
        halves.map(|half| self.avx2._mm256_cvtepu16_epi32(half))
    }

    #[inline(always)]
    fn bytes(self, from: [u8; LANES]) -> Self::Codes {
        let bytes: __m128i = cast(from);
        [bytes, self.sse2._mm_bsrli_si128::<8>(bytes)].map(|half| self.avx2._mm256_cvtepu8_epi32(half))
    }

    #[inline(always)]
    fn up(self, codes: Self::Codes, bits: u32) -> Self::Codes {
        codes.map(|codes| self.avx2._mm256_sllv_epi32(codes, self.avx._mm256_set1_epi32(bits as i32)))
    }

    #[inline(always)]
    fn down(self, codes: Self::Codes, bits: u32) -> Self::Codes {
        codes.map(|codes| self.avx2._mm256_srlv_epi32(codes, self.avx._mm256_set1_epi32(bits as i32)))
    }

    #[inline(always)]
    fn with_rest(self, twos: Self::Codes, rest: Self::Codes) -> Self::Codes {
        let low = self.avx._mm256_set1_epi32(3);
        std::array::from_fn(|half| {
            let rest = self.avx2._mm256_andnot_si256(low, rest[half]);
            self.avx2._mm256_or_si256(self.avx2._mm256_and_si256(twos[half], low), rest)
        })
    }

    #[inline(always)]
    fn look_up<const WIDE: bool, const APART: bool>(
        self,
        tables: [Self::Floats; 2],
        codes: Self::Codes,
    ) -> Self::Floats {
        std::array::from_fn(|half| {
            let ([low, high], codes) = (tables[if APART { half } else { 0 }], codes[half]);
            let low = self.avx2._mm256_permutevar8x32_ps(low, codes);
            if !WIDE {
                return low;
            }
            let high = self.avx2._mm256_permutevar8x32_ps(high, codes);
            // A blend goes by the sign bit, to which the fourth bit of the code is moved.
            let upper: __m256 = cast(self.avx2._mm256_slli_epi32::<28>(codes));
            self.avx._mm256_blendv_ps(low, high, upper)
        })
    }
}

#[cfg(target_arch = "x86_64")]
impl Lanes for V4 {
    type Floats = __m512;
    type Codes = __m512i;

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::Floats {
        cast(*from)
    }

    #[inline(always)]
    fn finite(self, from: [f16; LANES]) -> Self::Floats {
        self.avx512f._mm512_cvtph_ps(cast(from.map(f16::to_bits)))
    }

    #[inline(always)]
    fn store(self, from: Self::Floats, to: &mut [f32; LANES]) {
        *to = cast(from);
    }

    #[inline(always)]
    fn of_blocks(self, blocks: [f32; 2]) -> Self::Floats {
        cast(blocks.map(|block| self.avx._mm256_set1_ps(block)))
    }

    #[inline(always)]
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        self.avx512f._mm512_mul_ps(a, b)
    }

    #[inline(always)]
    fn mul_add(self, a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        self.avx512f._mm512_fmadd_ps(a, b, c)
    }

    #[inline(always)]
    fn words(self, from: [u8; 4 * LANES]) -> Self::Codes {
        cast(from)
    }

    #[inline(always)]
    fn halves(self, from: [u8; 2 * LANES]) -> Self::Codes {
        self.avx512f._mm512_cvtepu16_epi32(cast(from))
    }

    #[inline(always)]
    fn bytes(self, from: [u8; LANES]) -> Self::Codes {
        self.avx512f._mm512_cvtepu8_epi32(cast(from))
    }

    #[inline(always)]
    fn up(self, codes: Self::Codes, bits: u32) -> Self::Codes {
        self.avx512f._mm512_sllv_epi32(codes, self.avx512f._mm512_set1_epi32(bits as i32))
    }

    #[inline(always)]
    fn down(self, codes: Self::Codes, bits: u32) -> Self::Codes {
        self.avx512f._mm512_srlv_epi32(codes, self.avx512f._mm512_set1_epi32(bits as i32))
    }

    #[inline(always)]
    fn with_rest(self, twos: Self::Codes, rest: Self::Codes) -> Self::Codes {
        // Of (three, twos, rest): where a bit of three is set, that of twos.
        self.avx512f._mm512_ternarylogic_epi32::<0xca>(self.avx512f._mm512_set1_epi32(3), twos, rest)
    }

    #[inline(always)]
    fn look_up<const WIDE: bool, const APART: bool>(
        self,
        tables: [Self::Floats; 2],
        codes: Self::Codes,
    ) -> Self::Floats {
        if !APART {
            return self.avx512f._mm512_permutexvar_ps(codes, tables[0]);
        }
        // The fifth bit of an index says which table.
        let seconds: __m512i = cast(std::array::from_fn::<u32, LANES, _>(|lane| (lane / NUMBERS * LEVELS) as u32));
        let low = self.avx512f._mm512_set1_epi32(LEVELS as i32 - 1);
        let codes = self.avx512f._mm512_ternarylogic_epi32::<0xca>(low, codes, seconds);
        self.avx512f._mm512_permutex2var_ps(tables[0], codes, tables[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn finite<L: Lanes>(lanes: L, from: [f16; LANES]) -> [f32; LANES] {
        let mut to = [0.0; LANES];
        lanes.store(lanes.finite(from), &mut to);
        to
    }

    /// The levels of all fields of a pair of blocks, whose bytes and tables are these.
    fn levels<const BITS: usize, const APART: bool, L: Lanes>(
        lanes: L,
        pair: &[u8],
        tables: [&[f16]; 2],
    ) -> Vec<[f32; LANES]> {
        let (numbers, tables) = (lanes.numbers::<BITS>(pair), tables.map(|levels| lanes.table::<BITS>(levels)));
        let levels_of_field = |field| {
            let mut to = [0.0; LANES];
            lanes.store(lanes.levels::<BITS, APART>(tables, &numbers, field), &mut to);
            to
        };
        (0..FIELDS).map(levels_of_field).collect()
    }

    /// The code of a field of a number, bit by bit, as `LutMatrix` lays it out.
    fn code<const BITS: usize>(block: &[u8], number: usize, field: usize) -> usize {
        let bit = |at: usize| usize::from(block[at / 8] >> (at % 8) & 1);
        match BITS {
            3 => {
                let low = 16 * number + 2 * field;
                bit(low) + 2 * bit(low + 1) + 4 * bit(128 + 8 * number + field)
            }
            _ => (0..BITS).map(|i| bit(FIELDS * BITS * number + BITS * field + i) << i).sum(),
        }
    }

    fn look_ups_are_as_laid_out<const BITS: usize, const APART: bool>() {
        let mut rng = ChaCha8Rng::seed_from_u64(BITS as u64);
        for _ in 0..50 {
            let pair: Vec<u8> = (0..LANES * BITS).map(|_| rng.random()).collect();
            let level = |_| f16::from_f32(rng.random_range(-2.0..2.0));
            let own: Vec<Vec<f16>> =
                (0..2 << BITS).map(level).collect::<Vec<_>>().chunks(1 << BITS).map(Vec::from).collect();
            let tables = [&own[0][..], &own[usize::from(APART)][..]];
            let lane = |field: usize, lane: usize| {
                let (block, number) = (lane / NUMBERS, lane % NUMBERS);
                tables[block][code::<BITS>(&pair[block * NUMBERS * BITS..], number, field)].to_f32()
            };
            let expected: Vec<_> = (0..FIELDS).map(|field| std::array::from_fn(|l| lane(field, l))).collect();
            assert_eq!(levels::<BITS, APART, _>(Plain, &pair, tables), expected);
            #[cfg(target_arch = "x86_64")]
            {
                let of_v3 = V3::try_new().map(|lanes| levels::<BITS, APART, _>(lanes, &pair, tables));
                let of_v4 = V4::try_new().map(|lanes| levels::<BITS, APART, _>(lanes, &pair, tables));
                assert!([of_v3, of_v4].into_iter().flatten().all(|of| of == expected), "{BITS} {APART}");
            }
        }
    }

    #[test]
    fn all_processors_look_up_what_codes_name() {
        look_ups_are_as_laid_out::<2, false>();
        look_ups_are_as_laid_out::<2, true>();
        look_ups_are_as_laid_out::<3, false>();
        look_ups_are_as_laid_out::<3, true>();
        look_ups_are_as_laid_out::<4, false>();
        look_ups_are_as_laid_out::<4, true>();
    }

    #[test]
    fn finite_halves_are_their_numbers() {
        let all: Vec<_> = (0..=u16::MAX).map(f16::from_bits).filter(|v| v.is_finite()).collect();
        for from in all.as_chunks().0 {
            let expected = from.map(|v| v.to_f32().to_bits());
            assert_eq!(finite(Plain, *from).map(f32::to_bits), expected);
            #[cfg(target_arch = "x86_64")]
            {
                let of_v3 = V3::try_new().map(|lanes| finite(lanes, *from).map(f32::to_bits));
                let of_v4 = V4::try_new().map(|lanes| finite(lanes, *from).map(f32::to_bits));
                assert!([of_v3, of_v4].into_iter().flatten().all(|of| of == expected));
            }
        }
    }
}
