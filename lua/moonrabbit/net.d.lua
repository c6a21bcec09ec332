---@meta moonrabbit.net
--- The C module `moonrabbit.net`: non-blocking sockets, TLS, polling, signals. Nothing here blocks
--- and nothing here knows AMQP; an Engine of `moonrabbit.core` is met only as a pair of buffers
--- (csrc/lua/port.h).

---@class moonrabbit.net
local net = {}

--- Monotonic seconds.
---@return number
function net.now() end

--- Starts looking a name up in one of a few threads. Literal addresses and "localhost" are answered at once.
---@return moonrabbit.net.Resolver|nil, string? err, boolean? temporary
function net.resolve(host, port) end
---@class moonrabbit.net.Resolver : userdata
local Resolver = {}
---@return integer fd readable once the answer is there; -1 when it was there at once
function Resolver:fd() end
--- A list of addresses (opaque userdata each, with tostring), or nil, "again", or nil, "dns", text, temporary(boolean).
function Resolver:result() end
function Resolver:close() end
--- The address of a unix socket; or nil, "refused", text.
function net.unix(path) end

--- Starts connecting. tls: a context of net.tls or nil; server_name for SNI and the host name check.
--- Errors of connect and handshake begin with the address.
---@return moonrabbit.net.Stream|nil, string? kind, string? text, boolean? temporary
function net.connect(address, tls, server_name) end

---@class moonrabbit.net.Stream : userdata
local Stream = {}
---@return integer
function Stream:fd() end
--- What the last "again" waits for: "r" or "w".
---@return "r"|"w"
function Stream:wants() end
--- Finishes TCP connect and TLS handshake: true; nil, "again"; nil, kind ("refused" "timeout" "tls" "closed"),
--- text, temporary.
function Stream:handshake() end
--- Reads into the engine's buffer: bytes; nil, "again"; nil, "full" (pump first); nil, "closed", text ("" at the
--- peer's orderly end). Under TLS the kind may be "tls": the peer refused us after the handshake (TLS 1.3 tells only
--- then that it wants another client certificate), or sent what is no TLS. After a short read the next fill or read
--- answers "again" without a system call: wait for the descriptor before the one after it.
---@param engine moonrabbit.core.Engine
---@param now number? nil: the clock is read when bytes have come
function Stream:fill(engine, now) end
--- The same on a plain stream, but blocks the whole process until there are bytes or the time is over ("again").
---@param engine moonrabbit.core.Engine
---@param seconds number
function Stream:fill_within(engine, seconds) end
--- Writes what the engine has: true when all is written; nil, "again"; nil, "closed" or "tls", text.
function Stream:flush(engine, now) end
--- Plain bytes: a string; nil, "again"; nil, "closed", text ("" at the end).
function Stream:read(max) end
--- bytes written (maybe fewer); nil, "again"; nil, "closed", text. Under TLS some of them may wait in the stream
--- until the next write or `settle`.
function Stream:write(bytes, from) end
--- true when nothing that `write` took waits in the stream; nil, "again"; nil, "closed", text.
function Stream:settle() end
--- TLS version and cipher, for people; nil for a plain stream.
---@return string?
function Stream:tls_info() end
--- Idempotent. TLS: sends close_notify if it can be sent at once.
function Stream:close() end

--- opts: ca (file or folder; nil: the system's), cert, key (PEM files), verify (true), min_version ("1.2"|"1.3");
--- server_name is known but belongs to net.connect. Unknown options throw.
---@return moonrabbit.net.TlsContext|nil, string? text
function net.tls(opts) end

--- On an address in figures, "localhost" or "*"; without a port on a unix socket, in the place of one that nobody
--- listens on any more. Port 0: any.
---@return moonrabbit.net.Server|nil, string? err
function net.listen(host_or_path, port) end
---@class moonrabbit.net.Server : userdata
local Server = {}
function Server:fd() end
function Server:port() end
--- A Stream; nil, "again"; nil, "closed", text.
function Server:accept() end
function Server:close() end

---@return moonrabbit.net.Poller
function net.poller() end
---@class moonrabbit.net.Poller : userdata
local Poller = {}
--- events "r", "w", "rw" or "" (forget the descriptor); level-triggered; errors and hang-ups show as both.
function Poller:set(fd, events) end
--- Waits (nil: for ever; 0: not at all), returns how many descriptors are ready. A signal that net.signal watches ends it.
---@return integer
function Poller:wait(timeout) end
--- The next ready descriptor of the last wait: fd, readable, writable; nil after the last.
function Poller:next() end
function Poller:close() end

--- A descriptor that becomes readable at a set time, for loops that wait for descriptors only. Linux.
---@return moonrabbit.net.Alarm|nil, string? text
function net.alarm() end
---@class moonrabbit.net.Alarm : userdata
local Alarm = {}
---@return integer fd -1 when closed
function Alarm:fd() end
--- Readable from `seconds` on (zero or less: now) until it is set again.
---@param seconds number
function Alarm:set(seconds) end
function Alarm:close() end

--- Watches a signal ("INT" "TERM" "HUP" "USR1" ...), or stops watching and restores what was there before. The C
--- handler only counts and writes to a pipe; with exit_on_second, the second of the signals that are watched like
--- that ends the process from there with 128 + its number, even while Lua is busy.
---@param name string
---@param on boolean
---@param exit_on_second boolean?
function net.signal(name, on, exit_on_second) end
--- The name of a signal that arrived since, or nil. Poller:wait returns when one arrives.
---@return string?
function net.next_signal() end

--- This process's number.
---@return integer
function net.pid() end
--- Starts a program, found as a shell finds it. On Linux it gets SIGTERM when this process dies.
---@param words string[] the program and its arguments
---@param line boolean? with a line between both: our end comes back, the program's is its descriptor 3
---@return integer|nil pid, moonrabbit.net.Stream|string|nil line  or nil, err
function net.spawn(words, line) end
--- Our end of the line to the process that has spawned this one with it; nil, err when there is none.
---@return moonrabbit.net.Stream|nil, string? err
function net.parent() end
--- How a child that `spawn` started has ended: its exit code, or 128 and the signal's number; nil while it runs; nil, err.
---@param pid integer
---@return integer|nil code, string? err
function net.wait(pid) end
--- Sends a signal ("TERM", "HUP", "KILL", …) to a process.
---@return true|nil, string? err
function net.kill(pid, name) end
--- Sends one datagram to a unix socket; "@…": an abstract one.
---@return true|nil, string? err
function net.datagram(path, bytes) end

return net
