//! Arrow IPC files, Feather of version 2 among them: a footer lists the record batches, each of which is read whole and decoded.

use super::{
    columns::{decode, Batches, Columns},
    file::SourceFile,
    reader::Table,
};
use crate::{
    error::{Error, Result},
    host,
};
use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_ipc::{convert::try_fb_to_schema, reader::FileDecoder, root_as_footer, root_as_message, Block};
use std::{fmt, ops::Range, sync::Arc};

const MAGIC: &[u8] = b"ARROW1";

pub(crate) fn open(file: SourceFile, names: &[&str]) -> Result<Table<'static>> {
    let no_footer = || file.bad("it does not begin and end as Arrow IPC files do");
    let trailer_at = file.length().checked_sub(10).ok_or_else(no_footer)?;
    let trailer = file.bytes(trailer_at, 10)?;
    if file.bytes(0, MAGIC.len() as u64)? != MAGIC || trailer[4..] != *MAGIC {
        return Err(no_footer());
    }
    let size = i32::from_le_bytes(trailer[..4].try_into().expect("four bytes"));
    let footer_at = u64::try_from(size).ok().and_then(|size| trailer_at.checked_sub(size));
    let footer_at =
        footer_at.ok_or_else(|| file.bad(format!("a footer of {size} bytes, and {trailer_at} before it")))?;
    let footer = file.bytes(footer_at, trailer_at - footer_at)?;
    let (decoder, columns, blocks) = decode(&file, || parse(&file, &footer, names))?;
    let n = blocks.last().map_or(0, |(_, end)| *end);
    columns.table(ArrowBatches { file, decoder, blocks }, n, &footer)
}

/// Record batches, each with the number of rows up to its end.
type Blocks = Vec<(Block, u64)>;

fn parse(file: &SourceFile, footer: &[u8], names: &[&str]) -> Result<(FileDecoder, Columns, Blocks)> {
    let footer = root_as_footer(footer).map_err(|e| file.bad(e.to_string()))?;
    let schema = footer.schema().ok_or_else(|| file.bad("its footer has no schema"))?;
    if !schema.endianness().equals_to_target_endianness() {
        return Err(file.bad("its byte order is not this machine's"));
    }
    let schema = Arc::new(try_fb_to_schema(schema).map_err(|e| file.bad(e.to_string()))?);
    let columns = Columns::find(file, &schema, names)?;
    let (mut blocks, mut n) = (vec![], 0u64);
    for block in footer.recordBatches().into_iter().flatten() {
        let [offset, size, _] = place(file, block)?;
        let (_, rows) = message(file, &file.bytes(offset, size)?, &[])?;
        n = n.checked_add(rows).ok_or_else(|| file.bad("it has more than 2^64 rows"))?;
        blocks.push((*block, n));
    }
    let decoder = FileDecoder::new(schema, footer.version()).with_projection(columns.indices.clone());
    Ok((decoder, columns, blocks))
}

/// The offset of a block, and the sizes of its message and its body.
fn place(file: &SourceFile, block: &Block) -> Result<[u64; 3]> {
    let place = [block.offset(), block.metaDataLength().into(), block.bodyLength()];
    match place.map(u64::try_from) {
        [Ok(offset), Ok(message), Ok(body)] => Ok([offset, message, body]),
        _ => Err(file.bad(format!("a record batch at {}, of {} and {} bytes", place[0], place[1], place[2]))),
    }
}

/// The largest buffer that decoding `body` asks memory for, and the number of rows.
fn message(file: &SourceFile, message: &[u8], body: &[u8]) -> Result<(usize, u64)> {
    let bad = |e: &dyn fmt::Display| file.bad(format!("the message of a record batch: {e}"));
    // A mark of four bytes that older files lack, and the size of what follows.
    let skipped = if message.starts_with(&[0xff; 4]) { 8 } else { 4 };
    let message = message.get(skipped..).ok_or_else(|| bad(&"it is too short"))?;
    let message = root_as_message(message).map_err(|e| bad(&e))?;
    let batch = message.header_as_record_batch().ok_or_else(|| bad(&"it is of another kind"))?;
    let rows = u64::try_from(batch.length()).map_err(|_| bad(&format!("{} rows", batch.length())))?;
    let compressed = batch.compression().is_some() && !body.is_empty();
    let mut largest = 0;
    for buffer in batch.buffers().into_iter().flatten().filter(|buffer| compressed && buffer.length() > 0) {
        // The size once decompressed comes first.
        let size = usize::try_from(buffer.offset()).ok().and_then(|at| body.get(at..)?.first_chunk());
        let size = i64::from_le_bytes(*size.ok_or_else(|| bad(&"a buffer lies outside its body"))?);
        largest = largest.max(usize::try_from(size).unwrap_or(0));
    }
    Ok((largest, rows))
}

struct ArrowBatches {
    file: SourceFile,
    decoder: FileDecoder,
    blocks: Blocks,
}

impl ArrowBatches {
    fn batch(&self, block: &Block) -> Result<RecordBatch> {
        let file = &self.file;
        let [offset, message_size, body_size] = place(file, block)?;
        let bytes = file.bytes(offset, message_size.saturating_add(body_size))?;
        let (head, body) = bytes.split_at(message_size as usize);
        // The decoder allocates what a compressed buffer says; so it is asked for here first.
        host::buffer::<u8>("source", message(file, head, body)?.0)?;
        decode(file, || {
            let batch = self.decoder.read_record_batch(block, &Buffer::from_vec(bytes));
            batch.map_err(|e| file.bad(e.to_string()))?.ok_or_else(|| file.bad("a record batch is empty"))
        })
    }
}

impl Batches for ArrowBatches {
    fn file(&self) -> &SourceFile {
        &self.file
    }

    fn visit(&self, rows: Range<u64>, visit: &mut dyn FnMut(&RecordBatch) -> Result<()>) -> Result<()> {
        let from = self.blocks.partition_point(|(_, end)| *end <= rows.start);
        let mut begin = if from == 0 { 0 } else { self.blocks[from - 1].1 };
        for (block, end) in &self.blocks[from..] {
            if begin >= rows.end {
                break;
            }
            let batch = self.batch(block)?;
            if batch.num_rows() as u64 != end - begin {
                let (path, what) = (self.file.path().into(), format!("rows of the record batch at row {begin}"));
                let (got, expected) = (batch.num_rows().to_string(), (end - begin).to_string());
                return Err(Error::Mismatch { path, what, got, expected });
            }
            let (first, last) = (rows.start.max(begin), rows.end.min(*end));
            visit(&batch.slice((first - begin) as usize, (last - first) as usize))?;
            begin = *end;
        }
        Ok(())
    }
}
