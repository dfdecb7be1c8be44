//! What launchers tell the processes that they start.

use crate::error::{Error, Result};
use std::env;

/// The place of this process among those that a launcher has started.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Launch {
    pub rank: usize,
    pub ranks: usize,
    /// Its number among those of its machine.
    pub local_rank: usize,
    /// The address at which the first process waits for the others, `host:port`.
    pub address: String,
}

/// The variables of a launcher for a process's rank, the number of processes, and its rank on its machine.
struct Launcher {
    name: &'static str,
    rank: &'static str,
    ranks: &'static str,
    local_rank: &'static str,
}

/// Innermost first: `torchrun` may have been started by one of the others, and Open MPI inside a job of Slurm.
const LAUNCHERS: [Launcher; 4] = [
    Launcher { name: "torchrun", rank: "RANK", ranks: "WORLD_SIZE", local_rank: "LOCAL_RANK" },
    Launcher {
        name: "mpirun (Open MPI)",
        rank: "OMPI_COMM_WORLD_RANK",
        ranks: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
    },
    Launcher { name: "mpirun (MPICH)", rank: "PMI_RANK", ranks: "PMI_SIZE", local_rank: "MPI_LOCALRANKID" },
    Launcher { name: "srun", rank: "SLURM_PROCID", ranks: "SLURM_NTASKS", local_rank: "SLURM_LOCALID" },
];

/// Ports that a job's number is mapped to, below those that systems give to whoever asks for any.
const PORTS: std::ops::Range<u64> = 20_000..30_000;

impl Launch {
    /// The place of this process.
    pub fn of_process() -> Result<Self> {
        Self::new(|name| env::var(name).ok())
    }

    /// The place of a process with such an environment.
    fn new(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let found = LAUNCHERS.iter().find(|l| [l.rank, l.ranks, l.local_rank].iter().all(|name| var(name).is_some()));
        let Some(launcher) = found else {
            let with = "a process that none of torchrun, mpirun and srun has started".into();
            return Err(Error::Conflict { argument: "devices", got: "Devices::Launched".into(), with });
        };
        let number = |name: &'static str| {
            let text = var(name).unwrap_or_default();
            let unusable = || unusable(format!("{name}={text}"), "a number that this launcher gives".into());
            text.parse::<usize>().map_err(|_| unusable())
        };
        let (rank, ranks, local_rank) = (number(launcher.rank)?, number(launcher.ranks)?, number(launcher.local_rank)?);
        if rank >= ranks {
            return Err(Error::Range { argument: launcher.rank, got: rank, min: 0, max: ranks.saturating_sub(1) });
        }
        Ok(Self { rank, ranks, local_rank, address: address(launcher, ranks, &var)? })
    }
}

/// The address at which ranks meet: the one that NCCL has been told, or what the launcher tells.
fn address(launcher: &Launcher, ranks: usize, var: &impl Fn(&str) -> Option<String>) -> Result<String> {
    if let Some(address) = var("NCCL_COMM_ID") {
        return Ok(address);
    }
    let port_of = |job: &str| {
        // FNV-1a: jobs of one machine should not meet.
        let hash =
            job.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        PORTS.start + hash % (PORTS.end - PORTS.start)
    };
    if let Some(host) = var("MASTER_ADDR") {
        let port = match var("MASTER_PORT") {
            // The agent of torchrun listens there itself.
            Some(port) => {
                let unusable = || unusable(format!("MASTER_PORT={port}"), "a port below 65,535".into());
                let port: u16 = port.parse().map_err(|_| unusable())?;
                u64::from(port.checked_add(1).ok_or_else(unusable)?)
            }
            None => port_of(&host),
        };
        return Ok(joined(&host, port));
    }
    if let Some(hosts) = var("SLURM_STEP_NODELIST").or_else(|| var("SLURM_JOB_NODELIST")) {
        let [job, step] = ["SLURM_JOB_ID", "SLURM_STEP_ID"].map(|name| var(name).unwrap_or_default());
        return Ok(joined(&first_host(&hosts), port_of(&format!("{job}.{step}"))));
    }
    if var("OMPI_COMM_WORLD_LOCAL_SIZE").is_some_and(|local| local == ranks.to_string()) {
        let job = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"].iter().find_map(|name| var(name));
        return Ok(joined("127.0.0.1", port_of(&job.unwrap_or_default())));
    }
    let with =
        format!("{}, which does not say where ranks meet: set NCCL_COMM_ID=HOST:PORT or MASTER_ADDR", launcher.name);
    Err(Error::Conflict { argument: "devices", got: "Devices::Launched".into(), with })
}

fn unusable(got: String, with: String) -> Error {
    Error::Conflict { argument: "devices", got: format!("Devices::Launched with {got}"), with: format!("no {with}") }
}

fn joined(host: &str, port: u64) -> String {
    if host.contains(':') && !host.starts_with('[') {
        return format!("[{host}]:{port}");
    }
    format!("{host}:{port}")
}

/// The first host of a list as Slurm writes it: `gpu[03-05,9],login` is `gpu03`, and `rack[1-2]n[07,08]` is `rack1n07`.
fn first_host(hosts: &str) -> String {
    let (mut first, mut inside, mut taken) = (String::new(), false, false);
    for c in hosts.chars() {
        match c {
            '[' => (inside, taken) = (true, true),
            ']' => (inside, taken) = (false, false),
            ',' if !inside => break,
            ',' | '-' if inside => taken = false,
            c if !inside || taken => first.push(c),
            _ => {}
        }
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(vars: &[(&str, &str)]) -> Result<Launch> {
        Launch::new(|name| vars.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn launchers_say_who_is_who() {
        // As torchrun 2.8 sets them on the second of two machines with two GPUs each.
        let torchrun = [
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("GROUP_RANK", "1"),
            ("MASTER_ADDR", "10.0.0.7"),
            ("MASTER_PORT", "29500"),
            ("TORCHELASTIC_RUN_ID", "none"),
        ];
        let expected =
            |rank, ranks, local_rank, address: &str| Launch { rank, ranks, local_rank, address: address.into() };
        assert_eq!(launch(&torchrun).unwrap(), expected(3, 4, 1, "10.0.0.7:29501"));

        let slurm = [
            ("SLURM_PROCID", "5"),
            ("SLURM_NTASKS", "8"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_NODEID", "1"),
            ("SLURM_JOB_ID", "4711"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_JOB_NODELIST", "gpu[03-04]"),
            ("SLURM_STEP_NODELIST", "gpu[03-04]"),
        ];
        let of_slurm = launch(&slurm).unwrap();
        assert_eq!((of_slurm.rank, of_slurm.ranks, of_slurm.local_rank), (5, 8, 1));
        let (host, port) = of_slurm.address.split_once(':').unwrap();
        assert!(host == "gpu03" && PORTS.contains(&port.parse().unwrap()), "{}", of_slurm.address);
        // Whoever is in the same step meets at the same port, and torchrun inside of it has the last word.
        let other: Vec<_> =
            slurm.iter().map(|&(name, v)| (name, if name == "SLURM_PROCID" { "0" } else { v })).collect();
        assert_eq!(launch(&other).unwrap().address, of_slurm.address);
        assert_eq!(launch(&[&slurm[..], &torchrun].concat()).unwrap().ranks, 4);

        let open_mpi = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("PMIX_NAMESPACE", "2387476481"),
        ];
        let of_mpi = launch(&open_mpi).unwrap();
        assert_eq!((of_mpi.rank, of_mpi.ranks, of_mpi.local_rank), (1, 2, 1));
        assert!(of_mpi.address.starts_with("127.0.0.1:"), "{}", of_mpi.address);
        let mpich = [("PMI_RANK", "0"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "0"), ("MASTER_ADDR", "fe80::1")];
        assert!(launch(&mpich).unwrap().address.starts_with("[fe80::1]:"));
        assert_eq!(launch(&[&open_mpi[..], &[("NCCL_COMM_ID", "a:1")]].concat()).unwrap().address, "a:1");
    }

    #[test]
    fn what_no_launcher_says_is_refused() {
        for vars in [
            &[][..],
            &[("RANK", "0"), ("WORLD_SIZE", "2")],
            &[("RANK", "two"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "h")],
            &[("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "65535")],
            // Over several machines Open MPI does not say where.
            &[
                ("OMPI_COMM_WORLD_RANK", "1"),
                ("OMPI_COMM_WORLD_SIZE", "4"),
                ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
                ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ],
        ] {
            assert!(matches!(launch(vars), Err(Error::Conflict { argument: "devices", .. })), "{vars:?}");
        }
        let beyond = [("RANK", "2"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "h")];
        assert!(matches!(launch(&beyond), Err(Error::Range { argument: "RANK", got: 2, max: 1, .. })));
    }

    #[test]
    fn the_first_host_of_a_list() {
        for (list, first) in [
            ("gpu[03-05,9],login", "gpu03"),
            ("n7,n8", "n7"),
            ("n7", "n7"),
            ("nid[000123-000130]", "nid000123"),
            ("rack[1-2]n[07,08]", "rack1n07"),
            ("a[5]-b,c", "a5-b"),
        ] {
            assert_eq!(first_host(list), first);
        }
    }
}
