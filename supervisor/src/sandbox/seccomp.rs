//! System calls that no spoke needs, refused with EPERM.
//!
//! A list of what is refused, and not of what is allowed: what the libraries below a spoke call
//! changes with each of their versions, and a call that is missing from a list would be a crash in
//! production. The files and ports are Landlock's part; here are the calls that would reach around
//! it, those that touch other processes, and those that are known for holes in kernels.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, sock_filter,
};

/// Refused whatever the arguments are.
const NEVER: &[i64] = &[
    // Other processes: their memory, descriptors, priority.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_setpriority,
    libc::SYS_ioprio_set,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    libc::SYS_tkill,
    // Files without a path, and other views of the file system.
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_fanotify_init,
    libc::SYS_quotactl,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    // The kernel itself.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_userfaultfd,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_syslog,
    libc::SYS_personality,
    libc::SYS_vhangup,
    // Clock and names of the host.
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    // Memory and queues that are shared by name.
    libc::SYS_shmget,
    libc::SYS_shmat,
    libc::SYS_semget,
    libc::SYS_msgget,
    libc::SYS_mq_open,
    // Old ways into the hardware.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

/// Their first argument is a pid: refused for any but the caller's own.
const OWN_PID: &[i64] = &[
    libc::SYS_kill,
    libc::SYS_tgkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
];

/// Their first argument is a pid, or 0 for the caller: refused for any other. They need no more
/// than the same user, so a spoke could starve the hub with them.
const OWN_PID_OR_0: &[i64] = &[
    libc::SYS_prlimit64,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setattr,
];

/// Sends, and which argument has their flags.
const SENDS: &[(i64, u8)] = &[
    (libc::SYS_sendto, 3),
    (libc::SYS_sendmsg, 2),
    (libc::SYS_sendmmsg, 3),
];

/// A namespace of its own is a new kernel surface, and a process in one is root there. CLONE_NEWTIME
/// is no flag of clone(2), where its bit belongs to the signal.
const NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];

/// Families of sockets that a spoke uses; netlink for the addresses of this host (getaddrinfo).
const FAMILIES: [i32; 4] = [
    libc::AF_UNIX,
    libc::AF_INET,
    libc::AF_INET6,
    libc::AF_NETLINK,
];

/// Types of Internet sockets that are neither TCP nor UDP.
const ODD_TYPES: [i32; 4] = [libc::SOCK_RAW, libc::SOCK_SEQPACKET, 6, 10];
/// The bits of a socket's type that are not flags (SOCK_TYPE_MASK of the kernel).
const TYPE_MASK: u64 = 0xf;

/// Bit of the numbers of x32, a second table of system calls under the same architecture.
#[cfg(target_arch = "x86_64")]
const X32: u32 = 0x4000_0000;

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// The filters for the process `pid`, to be installed one after the other.
pub(super) fn programs(pid: u32, arch: TargetArch) -> Result<Vec<BpfProgram>, BackendError> {
    let refused = filter(rules(pid)?, EPERM, arch)?;
    // Its flags are in memory, where a filter cannot look. The C library falls back to clone.
    let unknown = filter(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        ENOSYS,
        arch,
    )?;
    Ok(vec![without_x32(refused), unknown])
}

fn filter(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    errno: u32,
    arch: TargetArch,
) -> Result<BpfProgram, BackendError> {
    // Another architecture has other numbers: the crate's preamble kills it.
    SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(errno),
        arch,
    )?
    .try_into()
}

/// A call matches when one of its rules does; a rule, when all its conditions do.
fn rules(pid: u32) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    use SeccompCmpOp::{Eq, MaskedEq, Ne};
    let is = |arg, op, value| SeccompCondition::new(arg, SeccompCmpArgLen::Dword, op, value);
    let bits = |bits: i32| u64::from(bits.cast_unsigned());
    let own = u64::from(pid);

    let mut all: BTreeMap<i64, Vec<SeccompRule>> =
        NEVER.iter().map(|call| (*call, Vec::new())).collect();
    for call in OWN_PID {
        all.insert(*call, vec![SeccompRule::new(vec![is(0, Ne, own)?])?]);
    }
    for call in OWN_PID_OR_0 {
        let other = vec![is(0, Ne, own)?, is(0, Ne, 0)?];
        all.insert(*call, vec![SeccompRule::new(other)?]);
    }
    // A fast open connects without connect(2), and Landlock does not see it.
    for (call, flags) in SENDS {
        let fast = bits(libc::MSG_FASTOPEN);
        let rule = SeccompRule::new(vec![is(*flags, MaskedEq(fast), fast)?])?;
        all.insert(*call, vec![rule]);
    }
    let namespace = |flag: i32| SeccompRule::new(vec![is(0, MaskedEq(bits(flag)), bits(flag))?]);
    let clone = NAMESPACES.into_iter().map(namespace);
    all.insert(libc::SYS_clone, clone.collect::<Result<_, _>>()?);

    let family = |f: i32| is(0, Ne, bits(f));
    let others = FAMILIES.into_iter().map(family).collect::<Result<_, _>>()?;
    let mut socket = vec![SeccompRule::new(others)?];
    socket.push(SeccompRule::new(vec![
        is(0, Eq, bits(libc::AF_NETLINK))?,
        is(2, Ne, bits(libc::NETLINK_ROUTE))?,
    ])?);
    for family in [libc::AF_INET, libc::AF_INET6] {
        // MPTCP, SMC and SCTP carry streams to any port, past the rules for TCP.
        socket.push(SeccompRule::new(vec![
            is(0, Eq, bits(family))?,
            is(1, MaskedEq(TYPE_MASK), bits(libc::SOCK_STREAM))?,
            is(2, Ne, 0)?,
            is(2, Ne, bits(libc::IPPROTO_TCP))?,
        ])?);
        for odd in ODD_TYPES {
            socket.push(SeccompRule::new(vec![
                is(0, Eq, bits(family))?,
                is(1, MaskedEq(TYPE_MASK), bits(odd))?,
            ])?);
        }
    }
    all.insert(libc::SYS_socket, socket);
    Ok(all)
}

/// Puts before the filter: a number of x32 ends the process, for no list here has it.
#[cfg(target_arch = "x86_64")]
fn without_x32(program: BpfProgram) -> BpfProgram {
    let statement = |code: u32, jt, jf, k| sock_filter {
        code: u16::try_from(code).unwrap_or_default(),
        jt,
        jf,
        k,
    };
    let kill: u32 = SeccompAction::KillProcess.into();
    let mut all = vec![
        // The number is the first word of what a filter sees.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 0, 1, X32),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, kill),
    ];
    all.extend(program);
    all
}

#[cfg(not(target_arch = "x86_64"))]
fn without_x32(program: BpfProgram) -> BpfProgram {
    program
}

/// Whether this kernel refuses calls for a filter.
pub(super) fn available() -> bool {
    let action: u32 = libc::SECCOMP_RET_ERRNO;
    #[expect(
        unsafe_code,
        reason = "the kernel reads one u32, which lives longer than the call"
    )]
    // SAFETY: see the reason above; seccomp(2), SECCOMP_GET_ACTION_AVAIL.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_ACTION_AVAIL,
            0,
            std::ptr::from_ref(&action),
        )
    };
    answer == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: u32 = 4242;
    const ARCH: u32 = 0xc000_003e;
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | EPERM;
    const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

    /// What the kernel would do: the strictest answer of all filters.
    fn judged(arch: u32, call: i64, args: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(u32::try_from(call).unwrap().to_ne_bytes());
        data.extend(arch.to_ne_bytes());
        data.extend(0u64.to_ne_bytes());
        data.extend(args.iter().flat_map(|a| a.to_ne_bytes()));
        let programs = programs(OWN, TargetArch::x86_64).unwrap();
        let strict = |answer: &u32| answer.cast_signed() & 0x7fff_0000_u32.cast_signed();
        let answers = programs.iter().map(|p| run(p, &data));
        answers.min_by_key(|a| (*a != KILL, strict(a))).unwrap()
    }

    /// The few instructions of classic BPF that filters here are made of.
    fn run(program: &[sock_filter], data: &[u8]) -> u32 {
        let (mut at, mut a) = (0usize, 0u32);
        loop {
            let s = &program[at];
            at += 1;
            let code = u32::from(s.code);
            let jump = |yes: bool| usize::from(if yes { s.jt } else { s.jf });
            match code & 0x07 {
                libc::BPF_LD => {
                    let k = s.k as usize;
                    a = u32::from_ne_bytes(data[k..k + 4].try_into().unwrap());
                }
                libc::BPF_ALU => a &= s.k,
                libc::BPF_JMP => match code & 0xf0 {
                    libc::BPF_JA => at += s.k as usize,
                    libc::BPF_JEQ => at += jump(a == s.k),
                    libc::BPF_JGT => at += jump(a > s.k),
                    libc::BPF_JGE => at += jump(a >= s.k),
                    other => panic!("jump {other:#x}"),
                },
                libc::BPF_RET => return s.k,
                other => panic!("class {other:#x}"),
            }
        }
    }

    fn flags(all: i32) -> u64 {
        u64::from(all.cast_unsigned())
    }

    #[test]
    fn calls_that_reach_around_the_sandbox_are_refused() {
        let (own, other) = (u64::from(OWN), 1);
        let stream = flags(libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK);
        let inet = flags(libc::AF_INET);
        let inet6 = flags(libc::AF_INET6);
        let thread = flags(libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND);
        let fast = flags(libc::MSG_FASTOPEN | libc::MSG_NOSIGNAL);
        for (call, args, wanted) in [
            (libc::SYS_ptrace, vec![16, other], REFUSE),
            (libc::SYS_process_vm_readv, vec![], REFUSE),
            (libc::SYS_io_uring_setup, vec![], REFUSE),
            (libc::SYS_unshare, vec![], REFUSE),
            (libc::SYS_mount, vec![], REFUSE),
            (libc::SYS_read, vec![], ALLOW),
            (libc::SYS_execve, vec![], ALLOW),
            (libc::SYS_openat, vec![], ALLOW),
            (libc::SYS_kill, vec![own, 6], ALLOW),
            (libc::SYS_kill, vec![other, 0], REFUSE),
            (libc::SYS_kill, vec![0, 9], REFUSE),
            (libc::SYS_kill, vec![u64::MAX, 9], REFUSE),
            (libc::SYS_tgkill, vec![own, 7, 6], ALLOW),
            (libc::SYS_tgkill, vec![other, 7, 6], REFUSE),
            (libc::SYS_prlimit64, vec![0, 7], ALLOW),
            (libc::SYS_prlimit64, vec![own, 7], ALLOW),
            (libc::SYS_prlimit64, vec![other, 7], REFUSE),
            (libc::SYS_sched_setaffinity, vec![0], ALLOW),
            (libc::SYS_sched_setaffinity, vec![other], REFUSE),
            (libc::SYS_clone, vec![thread], ALLOW),
            (
                libc::SYS_clone,
                vec![thread | flags(libc::CLONE_NEWUSER)],
                REFUSE,
            ),
            (libc::SYS_clone, vec![flags(libc::CLONE_NEWNET)], REFUSE),
            (libc::SYS_sendto, vec![3, 0, 0, 0], ALLOW),
            (libc::SYS_sendto, vec![3, 0, 0, fast], REFUSE),
            (libc::SYS_sendmsg, vec![3, 0, fast], REFUSE),
            (libc::SYS_sendmsg, vec![3, 0, 0, fast], ALLOW),
            (libc::SYS_sendmmsg, vec![3, 0, 1, fast], REFUSE),
            (
                libc::SYS_socket,
                vec![flags(libc::AF_UNIX), stream, 0],
                ALLOW,
            ),
            (libc::SYS_socket, vec![inet, stream, 0], ALLOW),
            (libc::SYS_socket, vec![inet6, stream, 6], ALLOW),
            (
                libc::SYS_socket,
                vec![inet, flags(libc::SOCK_DGRAM), 17],
                ALLOW,
            ),
            (
                libc::SYS_socket,
                vec![inet, stream, flags(libc::IPPROTO_MPTCP)],
                REFUSE,
            ),
            (
                libc::SYS_socket,
                vec![inet6, stream, flags(libc::IPPROTO_SCTP)],
                REFUSE,
            ),
            (
                libc::SYS_socket,
                vec![inet, flags(libc::SOCK_SEQPACKET), 0],
                REFUSE,
            ),
            (
                libc::SYS_socket,
                vec![inet, flags(libc::SOCK_RAW), 1],
                REFUSE,
            ),
            (
                libc::SYS_socket,
                vec![flags(libc::AF_NETLINK), flags(libc::SOCK_RAW), 0],
                ALLOW,
            ),
            (
                libc::SYS_socket,
                vec![flags(libc::AF_NETLINK), flags(libc::SOCK_RAW), 12],
                REFUSE,
            ),
            (libc::SYS_socket, vec![flags(libc::AF_ALG), 5, 0], REFUSE),
            (
                libc::SYS_socket,
                vec![flags(libc::AF_VSOCK), stream, 0],
                REFUSE,
            ),
            (libc::SYS_socket, vec![flags(libc::AF_PACKET), 3, 0], REFUSE),
            (libc::SYS_clone3, vec![], libc::SECCOMP_RET_ERRNO | ENOSYS),
        ] {
            let mut six = [0; 6];
            six[..args.len()].copy_from_slice(&args);
            let got = judged(ARCH, call, six);
            assert_eq!(got, wanted, "call {call} {args:x?}: {got:#x}");
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn another_table_of_calls_ends_the_process() {
        const I386: u32 = 0x4000_0003;
        assert_eq!(judged(I386, 26, [0; 6]), KILL);
        assert_eq!(judged(ARCH, 0x4000_0000 | libc::SYS_ptrace, [0; 6]), KILL);
    }
}
