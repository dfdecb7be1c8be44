//! Parquet files: of each row group the pages are decoded that hold the rows and columns asked for.

use super::{
    columns::{decode, Batches, Columns},
    file::SourceFile,
    reader::Table,
};
use crate::error::{Error, Result};
use arrow_array::RecordBatch;
use bytes::Bytes;
use parquet::{
    arrow::{
        arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder},
        ProjectionMask,
    },
    errors::{ParquetError, Result as ParquetResult},
    file::{
        metadata::PageIndexPolicy,
        reader::{ChunkReader, Length},
    },
};
use std::{
    io::{self, BufReader, Read},
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

/// Rows that are decoded at a time.
const BATCH: u64 = 1024;

pub(crate) fn open(file: SourceFile, names: &[&str]) -> Result<Table<'static>> {
    let file = Arc::new(file);
    let no_footer = || file.bad("it does not begin and end as Parquet files do");
    let trailer_at = file.length().checked_sub(8).ok_or_else(no_footer)?;
    let trailer = file.bytes(trailer_at, 8)?;
    if file.bytes(0, 4)? != *b"PAR1" || trailer[4..] != *b"PAR1" {
        return Err(no_footer());
    }
    let size = u32::from_le_bytes(trailer[..4].try_into().expect("four bytes")).into();
    let footer_at = trailer_at.checked_sub(size);
    let footer_at =
        footer_at.ok_or_else(|| file.bad(format!("a footer of {size} bytes, and {trailer_at} before it")))?;
    let footer = file.bytes(footer_at, size)?;

    let chunks = Chunks::new(&file);
    let metadata = decode(&file, || {
        // With an index of its pages, a file need not be read from the beginning of a row group.
        let options = ArrowReaderOptions::new().with_page_index_policy(PageIndexPolicy::Optional);
        ArrowReaderMetadata::load(&chunks, options).map_err(|e| chunks.error(&e))
    })?;
    let (mut ends, mut n) = (vec![], 0u64);
    for group in metadata.metadata().row_groups() {
        let rows = u64::try_from(group.num_rows()).ok().and_then(|rows| n.checked_add(rows));
        n = rows.ok_or_else(|| file.bad(format!("a row group of {} rows after {n}", group.num_rows())))?;
        ends.push(n);
    }
    let columns = Columns::find(&file, metadata.schema(), names)?;
    let mask = ProjectionMask::roots(metadata.parquet_schema(), columns.indices.iter().copied());
    columns.table(ParquetBatches { file, metadata, mask, ends }, n, &footer)
}

struct ParquetBatches {
    file: Arc<SourceFile>,
    metadata: ArrowReaderMetadata,
    mask: ProjectionMask,
    /// The number of rows up to the end of each row group.
    ends: Vec<u64>,
}

impl Batches for ParquetBatches {
    fn file(&self) -> &SourceFile {
        &self.file
    }

    fn visit(&self, rows: Range<u64>, visit: &mut dyn FnMut(&RecordBatch) -> Result<()>) -> Result<()> {
        let from = self.ends.partition_point(|&end| end <= rows.start);
        let to = self.ends.partition_point(|&end| end < rows.end) + 1;
        let begin = if from == 0 { 0 } else { self.ends[from - 1] };
        let chunks = Chunks::new(&self.file);
        let reader = decode(&self.file, || {
            let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(chunks.clone(), self.metadata.clone());
            let builder = builder.with_row_groups((from..to).collect()).with_projection(self.mask.clone());
            let count = rows.end - rows.start;
            let builder = builder.with_offset((rows.start - begin) as usize).with_limit(count as usize);
            builder.with_batch_size(count.min(BATCH) as usize).build().map_err(|e| chunks.error(&e))
        });
        let mut reader = reader?;
        while let Some(batch) = decode(&self.file, || reader.next().transpose().map_err(|e| chunks.error(&e)))? {
            visit(&batch)?;
        }
        Ok(())
    }
}

/// The file as the `parquet` crate reads it, whose errors do not keep ours.
#[derive(Clone)]
struct Chunks {
    file: Arc<SourceFile>,
    failed: Arc<Mutex<Option<Error>>>,
}

impl Chunks {
    fn new(file: &Arc<SourceFile>) -> Self {
        Self { file: file.clone(), failed: Arc::default() }
    }

    /// The error of a decoder: of the file, or else of its contents.
    fn error(&self, e: &dyn std::error::Error) -> Error {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        failed.unwrap_or_else(|| self.file.bad(e.to_string()))
    }

    fn keep(&self, e: Error) -> io::Error {
        let text = e.to_string();
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
        io::Error::other(text)
    }
}

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.file.length()
    }
}

impl ChunkReader for Chunks {
    type T = BufReader<Tail>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        Ok(BufReader::new(Tail { chunks: self.clone(), at: start }))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let bytes = self.file.bytes(start, length as u64);
        bytes.map(Bytes::from).map_err(|e| ParquetError::External(Box::new(self.keep(e))))
    }
}

/// The file from a position on.
struct Tail {
    chunks: Chunks,
    at: u64,
}

impl Read for Tail {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = self.chunks.file.length().saturating_sub(self.at);
        let count = into.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.chunks.file.read(self.at, &mut into[..count]).map_err(|e| self.chunks.keep(e))?;
        self.at += count as u64;
        Ok(count)
    }
}
