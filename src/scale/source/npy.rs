//! NumPy's `.npy` files.
//!
//! A header is a Python literal of three known keys, which is all that is parsed here. Parsers of any Python literal follow brackets
//! as deep as a file has them: `npyz` 0.9 takes twice as long for each further `[`, and a few thousand `(` end its stack.

use super::{
    file::SourceFile,
    matrix::{Header, Order},
    reader::Table,
    stored::StoredType,
};
use crate::error::Result;

pub(crate) const MAGIC: &[u8] = b"\x93NUMPY";

pub(crate) fn open(file: SourceFile) -> Result<Table<'static>> {
    let start = file.bytes(0, file.length().min(12))?;
    let (size, text_at) = match start.get(6..) {
        Some([1, 0, a, b, ..]) if start.starts_with(MAGIC) => (u64::from(u16::from_le_bytes([*a, *b])), 10),
        Some([2 | 3, 0, a, b, c, d]) if start.starts_with(MAGIC) => {
            (u64::from(u32::from_le_bytes([*a, *b, *c, *d])), 12)
        }
        _ => {
            return Err(file.bad(format!("it does not begin as .npy files of version 1, 2 or 3 do, but with {start:?}")))
        }
    };
    // Memory is asked for the text only if the file has it.
    let text = file.bytes(text_at, size)?;
    let header = parse(&text, text_at + size).map_err(|reason| file.bad(reason))?;
    header.table(file, &text)
}

/// The header of a file of one dimension, in version 1.0: the data follow at a multiple of 64 bytes.
pub(crate) fn header(descr: &str, n: u64) -> Vec<u8> {
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({n},), }}");
    let before = MAGIC.len() + 4;
    // A line that ends where the data begin.
    let size = (before + text.len() + 1).next_multiple_of(64) - before;
    text.extend(std::iter::repeat_n(' ', size - text.len() - 1));
    text.push('\n');
    [MAGIC, &[1, 0], &(size as u16).to_le_bytes(), text.as_bytes()].concat()
}

/// The header in a text, for data that follows at `offset`.
fn parse(text: &[u8], offset: u64) -> std::result::Result<Header, String> {
    let mut literal = Literal(std::str::from_utf8(text).map_err(|e| format!("its header is not text: {e}"))?);
    let (mut descr, mut fortran_order, mut shape) = (None, None, None);
    let unexpected = |rest: &str| {
        let rest: String = rest.trim_start().chars().take(40).collect();
        format!("its header is no dictionary of descr, fortran_order and shape at {rest:?}")
    };
    let mut go = || {
        literal.take("{")?;
        while literal.take("}").is_none() {
            let key = literal.string()?;
            literal.take(":")?;
            match key {
                "descr" => descr = Some(literal.string()?),
                "fortran_order" => fortran_order = Some(literal.bool()?),
                "shape" => shape = Some(literal.tuple()?),
                _ => return None,
            }
            if literal.take(",").is_none() {
                literal.take("}")?;
                break;
            }
        }
        literal.0.trim().is_empty().then_some(())
    };
    let parsed = go();
    let (Some(()), Some(descr), Some(fortran_order), Some(shape)) = (parsed, descr, fortran_order, shape) else {
        return Err(unexpected(literal.0));
    };
    // As many rows of one column, where there is one dimension.
    let (n, d) = match shape[..] {
        [n] => (n, 1),
        [n, d] => (n, d),
        _ => return Err(format!("an array of shape {shape:?} has {} dimensions, expected 2 or 1", shape.len())),
    };
    let stored = match descr.get(1..) {
        Some("u1") => StoredType::U8,
        Some("i1") => StoredType::I8,
        Some("f2") => StoredType::F16,
        Some("f4") => StoredType::F32,
        Some("f8") => StoredType::F64,
        _ => return Err(format!("its elements are {descr:?}, expected u1, i1, f2, f4 or f8")),
    };
    let big_endian = match descr.as_bytes()[0] {
        b'<' => false,
        b'>' => true,
        b'|' | b'=' if stored.size() == 1 => false,
        _ => return Err(format!("the byte order of its elements, {descr:?}, is neither < nor >")),
    };
    let order = if fortran_order { Order::Columns } else { Order::Rows };
    Ok(Header { offset, n, d, stored, order, big_endian })
}

/// The rest of a Python literal. A method leaves it as it is where it does not find its token.
struct Literal<'a>(&'a str);

impl<'a> Literal<'a> {
    fn take(&mut self, token: &str) -> Option<()> {
        self.0 = self.0.trim_start().strip_prefix(token)?;
        Some(())
    }

    /// Without escapes, which no key and no type has.
    fn string(&mut self) -> Option<&'a str> {
        let quote = if self.take("'").is_some() { '\'' } else { self.take("\"").map(|()| '"')? };
        let (string, rest) = self.0.split_once(quote)?;
        self.0 = rest;
        Some(string)
    }

    fn bool(&mut self) -> Option<bool> {
        if self.take("True").is_some() {
            return Some(true);
        }
        self.take("False").map(|()| false)
    }

    fn tuple(&mut self) -> Option<Vec<u64>> {
        let mut numbers = vec![];
        self.take("(")?;
        while self.take(")").is_none() {
            let text = self.0.trim_start();
            let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
            numbers.push(text[..end].parse().ok()?);
            self.0 = &text[end..];
            // Python 2 marked long integers.
            self.take("L");
            if self.take(",").is_none() {
                self.take(")")?;
                break;
            }
        }
        Some(numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn headers_are_read_however_python_writes_them() {
        for (text, n, d, order) in [
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }   \n", 3, 4, Order::Rows),
            ("{\"shape\":(3,4),\"fortran_order\":True,\"descr\":\"<f4\"}", 3, 4, Order::Columns),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (3L,)}", 3, 1, Order::Rows),
        ] {
            let header = parse(text.as_bytes(), 128).unwrap();
            assert_eq!((header.n, header.d, header.order, header.offset), (n, d, order, 128), "{text}");
            assert_eq!((header.stored, header.big_endian), (StoredType::F32, false));
        }
    }

    #[test]
    fn a_header_that_is_written_is_read() {
        for n in [0, 1, 9_999_999, u64::MAX] {
            let bytes = header("<f4", n);
            let read = parse(std::str::from_utf8(&bytes[10..]).unwrap().as_bytes(), bytes.len() as u64).unwrap();
            assert_eq!((read.n, read.d, read.order, read.offset % 64), (n, 1, Order::Rows, 0));
            assert_eq!(bytes[8..10], (bytes.len() as u16 - 10).to_le_bytes());
            assert_eq!(bytes[bytes.len() - 1], b'\n');
        }
    }

    #[test]
    fn other_headers_are_refused_with_the_reason() {
        for (text, reason) in [
            ("{'descr': '<i4', 'fortran_order': False, 'shape': (3, 4)}", "its elements are \"<i4\""),
            ("{'descr': '', 'fortran_order': False, 'shape': (3, 4)}", "its elements are \"\""),
            ("{'descr': 'éf4', 'fortran_order': False, 'shape': (3, 4)}", "its elements are"),
            ("{'descr': '|f4', 'fortran_order': False, 'shape': (3, 4)}", "neither < nor >"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4, 5)}", "has 3 dimensions"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': ()}", "has 0 dimensions"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (3, -4)}", "no dictionary"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 18446744073709551616)}", "no dictionary"),
            ("{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (3, 4)}", "at \"[('x'"),
            ("{'descr': '<f4', 'fortran_order': False}", "no dictionary"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4)} x", "no dictionary"),
        ] {
            let refused = parse(text.as_bytes(), 0).unwrap_err();
            assert!(refused.contains(reason), "{text}: {refused}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[{}()'\":,a-fL0-9 é<>|]{0,80}", offset: u64) {
            if let Ok(header) = parse(text.as_bytes(), offset) {
                header.file_length();
            }
        }

        #[test]
        fn no_shape_overflows(n: u64, d: u64, offset: u64) {
            let text = format!("{{'descr': '>f8', 'fortran_order': True, 'shape': ({n}, {d})}}");
            let length = parse(text.as_bytes(), offset).unwrap().file_length().map(u128::from);
            let exact = u128::from(n).checked_mul(u128::from(d)).and_then(|e| e.checked_mul(8)?.checked_add(offset.into()));
            prop_assert_eq!(length, exact.filter(|&e| e <= u64::MAX.into() && u128::from(d) * 8 <= u64::MAX.into()));
        }
    }
}
