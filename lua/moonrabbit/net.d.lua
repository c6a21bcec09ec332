---@meta moonrabbit.net
--- The C module `moonrabbit.net`: non-blocking sockets, TLS, polling, signals. Nothing here blocks
--- and nothing here knows AMQP; an Engine of `moonrabbit.core` is met only as a pair of buffers
--- (csrc/lua/port.h).

---@class moonrabbit.net
local net = {}

--- Monotonic seconds.
---@return number
function net.now() end

--- Starts looking a name up in a thread of its own. Literal addresses and "localhost" are answered at once.
---@return moonrabbit.net.Resolver|nil, string? err
function net.resolve(host, port) end
---@class moonrabbit.net.Resolver : userdata
local Resolver = {}
---@return integer fd readable once the answer is there
function Resolver:fd() end
--- A list of addresses (opaque userdata each, with tostring), or nil, "again", or nil, "dns", text, temporary(boolean).
function Resolver:result() end
function Resolver:close() end
--- The address of a unix socket.
function net.unix(path) end

--- Starts connecting. tls: a context of net.tls or nil; server_name for SNI and the host name check.
---@return moonrabbit.net.Stream|nil, string? kind, string? text
function net.connect(address, tls, server_name) end

---@class moonrabbit.net.Stream : userdata
local Stream = {}
---@return integer
function Stream:fd() end
--- What the last "again" waits for: "r" or "w".
---@return "r"|"w"
function Stream:wants() end
--- Finishes TCP connect and TLS handshake: true; nil, "again"; nil, kind ("refused" "timeout" "tls" "closed"), text.
function Stream:handshake() end
--- Reads into the engine's buffer: bytes; nil, "again"; nil, "full" (pump first); nil, "closed", text.
function Stream:fill(engine, now) end
--- Writes what the engine has: true when all is written; nil, "again"; nil, "closed", text.
function Stream:flush(engine, now) end
--- Plain bytes: a string; nil, "again"; nil, "closed", text ("" at the end).
function Stream:read(max) end
--- bytes written (maybe fewer); nil, "again"; nil, "closed", text.
function Stream:write(bytes, from) end
--- Idempotent. TLS: sends close_notify if it can be sent at once.
function Stream:close() end

--- opts: ca (file or folder; nil: the system's), cert, key (PEM files), verify (true), min_version ("1.2"|"1.3").
---@return moonrabbit.net.TlsContext|nil, string? text
function net.tls(opts) end

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

--- Watches a signal ("INT" "TERM" "HUP" "USR1" ...), or stops watching. The C handler only counts and writes to a pipe.
---@param on boolean
function net.signal(name, on) end
--- The name of a signal that arrived since, or nil. Poller:wait returns when one arrives.
---@return string?
function net.next_signal() end

return net
