//! A plan is what runs: the kernels that it names are those that a fit has run, and no others.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{assign, testing, EmptyClusters, Init, KMeans, Metric, Plan};
use std::collections::BTreeSet;

/// The kernels of a loop that `f` runs, in their order, by the names that plans have for them.
fn ran(f: impl FnOnce()) -> Vec<String> {
    testing::launches();
    f();
    testing::launches().iter().filter_map(|launch| planned(launch)).collect()
}

/// The name of a kernel that plans name, without its type and the columns that it is compiled for.
fn planned(launch: &str) -> Option<String> {
    let (name, _) = launch.rsplit_once('_')?;
    let name = match name.rsplit_once('_') {
        Some((name, columns)) if columns.parse::<usize>().is_ok() => name,
        _ => name,
    };
    let of_a_loop = ["assign_", "fit_", "cpu_", "medians", "update"].iter().any(|kind| name.starts_with(kind));
    // These are beside the kernel that a plan names.
    (of_a_loop && !["update_exact", "assign_near"].contains(&name)).then(|| name.to_string())
}

/// Whether this is a fit by the plan: one kernel, or assignments and between them updates, at least one. What is not for rows on a line
/// is left to another kernel, which is launched in any case.
fn follows(plan: &Plan, ran: &[String]) -> bool {
    match (plan.assign == plan.update, plan.update) {
        (true, "fit_line") => return ran == ["fit_line", "fit_narrow"],
        (true, one) => return ran == [one],
        _ => {}
    }
    let named = |i: usize| if i.is_multiple_of(2) { plan.assign } else { plan.update };
    ran.len() >= 3 && ran.len() % 2 == 1 && ran.iter().enumerate().all(|(i, name)| name == named(i))
}

/// The kernels of a run. On the CPU it ends with the inertia's sum.
fn ran_in(run: impl FnOnce(), x: &Tensor) -> Vec<String> {
    let mut ran = ran(run);
    if x.device().is_cpu() {
        assert_eq!(ran.pop().as_deref(), Some("cpu_sums"), "{ran:?}");
    }
    ran
}

fn of(settings: &KMeans, weights: &Tensor, lengths: &Tensor) -> Vec<(&'static str, KMeans)> {
    vec![
        ("plain", settings.clone()),
        ("weighted", settings.clone().sample_weights(weights)),
        ("ragged", settings.clone().lengths(lengths)),
        ("watched", settings.clone().on_iteration(|_| {})),
        ("relocated", settings.clone().empty_clusters(EmptyClusters::Relocate)),
    ]
}

#[test]
fn plans_name_what_runs() {
    let sizes = [
        [1, 60, 3, 1],
        [3, 90, 5, 3],
        [70, 40, 6, 2],
        [2, 200, 7, 8],
        [2, 300, 12, 16],
        [3, 257, 20, 33],
        [2, 700, 40, 64],
        [1, 600, 530, 12],
    ];
    for device in devices() {
        let mut named = BTreeSet::new();
        for (case, [b, n, k, d]) in sizes.into_iter().enumerate() {
            for (metric, dtype) in METRICS.into_iter().flat_map(|m| DTYPES.map(|t| (m, t))) {
                let rng = &mut rng(case as u64);
                let x = uniform(&[b, n, d], 0.0, 1.0, dtype, rng).to_device(&device).unwrap();
                let weights = uniform(&[b, n], 1.0, 0.5, DType::F64, rng).to_device(&device).unwrap();
                let lengths = Tensor::full(n as u32 - 1, b, &device).unwrap();
                let settings = KMeans::new(k).metric(metric).max_iters(2).tol(0.0).init(Init::Even);
                let mut views: Vec<_> = layouts(&x).into_iter().map(|laid| (laid.name, laid.view)).collect();
                views.push(("one row for all".into(), x.narrow(1, 0, 1).unwrap().broadcast_as(x.shape()).unwrap()));
                views.push(("contiguous".into(), x.clone()));
                for (setting, settings) in of(&settings, &weights, &lengths) {
                    // One fit for all layouts: its plan is that of the rows that it ran on last.
                    let mut prepared = settings.prepare(x.shape(), dtype, &device).unwrap();
                    for (layout, x) in &views {
                        let plan = settings.plan(x).unwrap();
                        let ran = ran_in(|| prepared.run(x).unwrap(), x);
                        let what = format!("{setting}, {layout}, {b} {n} {k} {d} {metric:?} {dtype:?}");
                        assert!(follows(&plan, &ran), "{what}: {plan}, but {ran:?}");
                        assert_eq!(prepared.plan(), &plan, "{what}");
                        named.extend([plan.assign, plan.update]);
                    }
                }
            }
        }
        let all: &[&str] = match testing::capability(&device).unwrap() {
            0 => &["cpu_gemm", "cpu_line", "cpu_manhattan", "cpu_medians", "cpu_sums"],
            80.. => &[
                "assign_narrow",
                "assign_simt_dot",
                "assign_simt_manhattan",
                "fit_line",
                "fit_narrow",
                "fit_resident",
                "fit_resident_weighted",
                "medians",
                "update",
                "update_narrow",
                "update_narrow_weighted",
                "update_weighted",
            ],
            _ => &["assign_simt_dot", "medians", "update"],
        };
        let missing: Vec<_> = all.iter().filter(|name| !named.contains(*name)).collect();
        assert!(missing.is_empty(), "no fit was by {missing:?}: {named:?}");
    }
}

/// A kernel that is forced is in the plan, and does the work of no other; rows that it cannot read are packed once.
#[test]
fn plans_name_what_is_forced() {
    for device in devices() {
        for (dtype, d, strange) in [
            (DType::F16, 64, false),
            (DType::BF16, 65, true),
            (DType::F32, 64, false),
            (DType::F16, 8, false),
            (DType::F32, 1, false),
        ] {
            let x = uniform(&[300, d], 0.0, 1.0, dtype, &mut rng(36)).to_device(&device).unwrap();
            let settings = KMeans::new(5).init(Init::Random).max_iters(2).tol(0.0);
            for kernel in testing::candidates(&x, 5, Metric::SquaredEuclidean).unwrap() {
                testing::force(Some(kernel));
                let (plan, mut prepared) = (settings.plan(&x).unwrap(), settings.prepare(x.shape(), dtype, &device));
                testing::force(None);
                let prepared = prepared.as_mut().unwrap();
                testing::launches();
                prepared.run(&x).unwrap();
                let launched = testing::launches();
                let packs = launched.iter().filter(|l| l.starts_with("pack")).count();
                assert_eq!(plan.assign, kernel);
                assert_eq!(prepared.plan(), &plan, "a prepared fit keeps its plan");
                assert_eq!(plan.pack, strange && kernel.contains("_sm"));
                assert_eq!(packs, plan.pack as usize, "once for all iterations: {launched:?}");
                let mut ran: Vec<_> = launched.iter().filter_map(|launch| planned(launch)).collect();
                if device.is_cpu() {
                    ran.pop();
                }
                assert!(follows(&plan, &ran), "{plan}, but {ran:?}");
            }
        }
    }
}

/// Rows of one column that sorting them does not help are fitted by the loop, and the next ones by sorting again.
#[test]
fn values_that_are_not_for_a_line() {
    let [x, finite] = [f32::NAN, 3.0].map(|v| Tensor::new(&[[0f32], [1.], [v], [7.], [9.]], &Device::Cpu).unwrap());
    let settings = KMeans::new(2).init(Init::Even).tol(0.0).check_finite(false);
    let mut prepared = settings.prepare(x.shape(), x.dtype(), x.device()).unwrap();
    for (x, expected) in [(&x, "cpu_gemm"), (&finite, "cpu_line"), (&x, "cpu_gemm")] {
        assert_eq!((prepared.plan().assign, prepared.plan().update), ("cpu_line", "cpu_line"));
        let ran = ran_in(|| prepared.run(x).unwrap(), x);
        assert_eq!(ran[0], expected, "{ran:?}");
    }
}

/// An op that is called alone is planned as a fit's is.
#[test]
fn an_assignment_is_by_the_chosen_kernel() {
    for device in devices() {
        for [b, n, k, d] in [[1, 100, 4, 3], [2, 300, 20, 64], [1, 900, 600, 40]] {
            for (metric, dtype) in METRICS.into_iter().flat_map(|m| DTYPES.map(|t| (m, t))) {
                let x = uniform(&[b, n, d], 0.0, 1.0, dtype, &mut rng(4)).to_device(&device).unwrap();
                let c = x.narrow(1, 0, k).unwrap();
                for laid in layouts(&x) {
                    let ran = ran(|| drop(assign(&laid.view, &c, metric).unwrap()));
                    let chosen = testing::chosen(&laid.view, k, metric).unwrap();
                    assert_eq!(ran, [chosen], "{}, {b} {n} {k} {d} {metric:?} {dtype:?}", laid.name);
                }
            }
        }
    }
}

/// A plan names the fit in one launch only where all of its blocks run at once.
#[cfg(feature = "cuda")]
#[test]
fn teams_that_do_not_fit_are_not_planned() {
    for device in devices().into_iter().filter(Device::is_cuda) {
        let x = uniform(&[2, 2048, 64], 0.0, 1.0, DType::F16, &mut rng(5)).to_device(&device).unwrap();
        let settings = KMeans::new(32).max_iters(2).tol(0.0).init(Init::Even);
        for (limit, update) in [(None, "fit_resident"), (Some(1), "update")] {
            testing::limit_blocks_at_once(limit);
            let (plan, fit) = (settings.plan(&x).unwrap(), settings.prepare(x.shape(), DType::F16, &device));
            testing::limit_blocks_at_once(None);
            assert_eq!(plan.update, update);
            let ran = ran_in(|| fit.unwrap().run(&x).unwrap(), &x);
            assert!(follows(&plan, &ran), "{plan}, but {ran:?}");
        }
    }
}
