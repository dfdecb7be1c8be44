//! Several tables as one.

use super::reader::{ReadRows, Table};
use crate::error::{Error, Result};
use std::ops::Range;

/// The rows of all tables, in their order.
pub(crate) fn concat(parts: Vec<Table<'_>>) -> Result<Table<'_>> {
    let Some(first) = parts.first() else {
        return Err(Error::Range { argument: "parts", got: 0, min: 1, max: usize::MAX });
    };
    let (d, stored) = (first.d, first.stored);
    let name = match parts.len() {
        1 => first.name.clone(),
        count => format!("{} and {} more", first.name, count - 1),
    };
    let (mut n, mut ends) = (0u64, vec![]);
    for part in &parts {
        let mismatch = |what: &str, got: String, expected: String| {
            let (path, expected) = (part.name.clone(), format!("{expected} as in {}", first.name));
            Err(Error::Mismatch { path, what: what.into(), got, expected })
        };
        if part.d != d {
            return mismatch("number of columns", part.d.to_string(), d.to_string());
        }
        if part.stored != stored {
            return mismatch("type", part.stored.to_string(), stored.to_string());
        }
        let limit = usize::MAX;
        n = n.checked_add(part.n).ok_or(Error::TooLarge { argument: "parts", got: limit, limit })?;
        ends.push(n);
    }
    let files = parts.iter().flat_map(|part| part.files.iter().cloned()).collect();
    Ok(Table { name, n, d, stored, files, reader: Box::new(Concatenated { parts, ends }) })
}

struct Concatenated<'a> {
    parts: Vec<Table<'a>>,
    /// The number of rows up to the end of each part.
    ends: Vec<u64>,
}

impl<'a> Concatenated<'a> {
    /// The parts that these rows lie in, and which of its own rows they are of each.
    fn parts_of(&self, rows: Range<u64>) -> impl Iterator<Item = (&Table<'a>, Range<u64>)> {
        let from = self.ends.partition_point(|&end| end <= rows.start);
        let parts = self.parts[from..].iter().zip(&self.ends[from..]);
        parts
            .map(|(part, &end)| (part, end - part.n))
            .take_while(move |&(_, first)| first < rows.end)
            .map(move |(part, first)| (part, rows.start.saturating_sub(first)..part.n.min(rows.end - first)))
    }
}

impl ReadRows for Concatenated<'_> {
    fn read(&self, rows: Range<u64>, mut into: &mut [u8]) -> Result<()> {
        for (part, own) in self.parts_of(rows) {
            let bytes = (own.end - own.start) as usize * part.row_size();
            let (head, rest) = into.split_at_mut(bytes);
            part.reader.read(own, head)?;
            into = rest;
        }
        Ok(())
    }

    fn in_memory<'s>(&'s self, rows: Range<u64>, pieces: &mut Vec<&'s [u8]>) -> bool {
        self.parts_of(rows).all(|(part, own)| part.reader.in_memory(own, pieces))
    }
}
