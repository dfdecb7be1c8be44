//! The benches share this: shapes with a word for each, data, and timing that waits for the device.

use candle_core::{Device, Tensor};
use criterion::{BenchmarkGroup, Criterion, Throughput};
use std::time::{Duration, Instant};

/// A shape and why it is here.
pub struct Shape {
    pub name: &'static str,
    pub b: usize,
    pub n: usize,
    pub k: usize,
    pub d: usize,
}

pub const SHAPES: [Shape; 3] = [
    Shape { name: "one_large_problem", b: 1, n: 100_000, k: 256, d: 128 },
    Shape { name: "keys_of_many_heads", b: 8, n: 2048, k: 64, d: 64 },
    Shape { name: "product_quantizer", b: 64, n: 4096, k: 64, d: 4 },
];

impl Shape {
    pub fn rows(&self, device: &Device) -> Tensor {
        Tensor::randn(0f32, 1f32, (self.b, self.n, self.d), device).expect("a device with room for the shape")
    }
}

/// The CPU, and the GPU of a build that has one.
pub fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    if cfg!(feature = "cuda") {
        devices.push(Device::new_cuda(0).expect("a build with `cuda` benches on a GPU"));
    }
    devices
}

/// Runs `f` on every shape and device, `bytes` being what one run reads.
pub fn each(c: &mut Criterion, op: &str, prepare: impl Fn(&Shape, &Tensor) -> Box<dyn FnMut()>) {
    for device in devices() {
        let place = if device.is_cpu() { "cpu" } else { "cuda" };
        let mut group: BenchmarkGroup<_> = c.benchmark_group(format!("{op}/{place}"));
        group.sample_size(10).measurement_time(Duration::from_secs(3));
        for shape in &SHAPES {
            let x = shape.rows(&device);
            group.throughput(Throughput::Bytes(4 * x.elem_count() as u64));
            let mut f = prepare(shape, &x);
            group.bench_function(shape.name, |bencher| {
                bencher.iter_custom(|iterations| {
                    device.synchronize().expect("the device answers");
                    let start = Instant::now();
                    (0..iterations).for_each(|_| f());
                    device.synchronize().expect("the device answers");
                    start.elapsed()
                })
            });
        }
    }
}
