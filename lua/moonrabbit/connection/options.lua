--- What a connection can be told: the options of moonrabbit.connect, and their checks.
-- @module moonrabbit.connection.options

local options = require "moonrabbit.options"
local Backoff = require "moonrabbit.connection.backoff"
local pcall = require "moonrabbit.protect"

local check = options.check

---@class moonrabbit.ConnectOptions
---@field uri string?              `amqp[s]://user:password@host:port/vhost?query`; "amqp://" by default. See moonrabbit.uri
---@field endpoints string[]?      URIs instead of `uri`; tried in order until one takes us
---@field mode ("direct"|"proxy"|"smart")?  "direct", the default: the endpoints as they are listed; "proxy": one balancer; "smart": the other nodes are learned. docs/clusters.md
---@field shuffle boolean?         tries the endpoints in another order each time; false by default
---@field near string?             mode "smart": a queue, whose leader's node is tried first
---@field management (string|table)?  mode "smart": address of the management API or options of it (moonrabbit.management), or a list of these; by default that of each endpoint, at port 15672, or 15671 with TLS
---@field smart moonrabbit.SmartOptions?  mode "smart": how
---@field dns moonrabbit.DnsOptions?  whom to ask for SRV records; what /etc/resolv.conf says by default
---@field sites moonrabbit.SitesOptions?  a primary and a standby site, instead of `uri` and `endpoints`
---@field vhost string?            instead of the URI's; "/" by default
---@field user string?             instead of the URI's; "guest" by default
---@field password (string|fun(): string|nil, string?)?  instead of the URI's; "guest" by default. A function is called at each connect, and answers the password, or nil and why there is none
---@field mechanism ("PLAIN"|"AMQPLAIN"|"EXTERNAL")?     "PLAIN" by default; "EXTERNAL" is for client certificates
---@field heartbeat integer?       seconds, 0: none; 60 by default. The smaller of ours and the broker's counts. https://www.rabbitmq.com/docs/heartbeats
---@field frame_max integer?       bytes, at least 4096; 0, the default: 131072. The smaller of ours and the broker's counts
---@field channel_max integer?     0, the default: what the broker says. The smaller of ours and the broker's counts
---@field connect_timeout number?  seconds for all of it: name, TCP, TLS, AMQP; 10 by default
---@field timeout number?          seconds that a call waits unless it says otherwise; 30 by default
---@field tls (boolean|moonrabbit.TlsOptions)?  on with `amqps://`, else off by default; the fields are over the URI's
---@field name string?             shown by the management UI (connection_name)
---@field client_properties table? further client properties; they go over ours
---@field max_message_size integer? bytes of a body, both ways; 128 MiB by default. A larger one to send is `overflow`, one that comes ends the connection
---@field max_buffer integer?      bytes of output that may wait; 1 MiB by default. Past it a publish waits
---@field ack_delay number?        seconds that an ack may wait for others to go with; 0.001 by default
---@field health ("fixed"|"adaptive"|"consecutive"|moonrabbit.HealthOptions|false)?  how the broker's silence is judged; by default, and at the latest, nothing heard for two heartbeat intervals ends the connection. See moonrabbit.health
---@field reconnect (boolean|moonrabbit.ReconnectOptions)?  how to come back when the connection is lost; on by default, false: it ends then. docs/connections.md
---@field recover (boolean|moonrabbit.RecoveryOptions)?  what to restore then; all by default, false: only the channels
---@field runtime (string|table)?  a name or a runtime (docs/internals.md); "native" by default, and never guessed
---@field log fun(level: string, text: string)?  level: "debug", "info", "warn" or "error"; by default warnings and errors go to stderr

---@class moonrabbit.TlsOptions
---@field ca string?           file or folder of trusted certificates (PEM); the system's by default
---@field cert string?         client certificate (PEM)
---@field key string?          its key (PEM)
---@field verify boolean?      certificate and host name; true by default
---@field server_name string?  name to verify and to send as SNI; the host by default
---@field min_version ("1.2"|"1.3")?  "1.2" by default

---@class moonrabbit.RecoveryOptions
---@field topology boolean?   exchanges, queues and bindings that were declared over this connection; true by default
---@field consumers boolean?  consumers; true by default, false: they end with the connection
---@field filter fun(kind: string, entity: table): boolean?  false leaves one out. kind: "exchange", "queue", "exchange_binding", "queue_binding" or "consumer"; entity: its names and arguments. It must not wait

local connection_options = {}

--- Of `tls`.
local tls_options = {
  ca = options.string, cert = options.string, key = options.string, verify = options.boolean,
  server_name = options.string, min_version = options.one_of("1.2", "1.3"),
}

local endpoint_list = options.list_of(options.string, "a list of URIs", 1)

local recovery_options = {
  topology = options.boolean, consumers = options.boolean, filter = options.callback,
}

local connect_options = options.merge(require("moonrabbit.cluster").options, {
  uri = options.string,
  endpoints = endpoint_list,
  vhost = options.shortstr,
  user = options.string,
  password = options.either(options.string, options.callback),
  mechanism = options.one_of("PLAIN", "AMQPLAIN", "EXTERNAL"),
  heartbeat = options.integer(0, 65535),
  frame_max = options.integer(0, 2147483647),
  channel_max = options.integer(0, 65535),
  connect_timeout = options.seconds,
  timeout = options.seconds,
  tls = options.either(options.boolean, options.table),
  name = options.string,
  client_properties = options.table,
  max_message_size = options.integer(1, 9007199254740991),
  max_buffer = options.integer(1, 9007199254740991),
  ack_delay = options.seconds,
  reconnect = options.either(options.boolean, options.table),
  recover = options.either(options.boolean, options.table),
  runtime = options.either(options.string, options.table),
  log = options.callback,
  health = options.either(options.boolean, options.string, options.table),
})

connection_options.schema, connection_options.tls = connect_options, tls_options

--- Checks what moonrabbit.connect was given, at `level` of the caller.
---@param given string|moonrabbit.ConnectOptions
---@param level integer
---@return moonrabbit.ConnectOptions
function connection_options.check(given, level)
  level = level + 1
  local opts = given
  if type(given) == "string" then
    opts = { uri = given }
  elseif type(given) ~= "table" then
    error("connect: a URI or a table of options expected, not a " .. type(given), level)
  end
  check("connect", opts, connect_options, level)
  if type(opts.tls) == "table" then check("connect: tls", opts.tls, tls_options, level) end
  for name, site in pairs(opts.sites or {}) do
    local tls = type(site) == "table" and site.tls
    if type(tls) == "table" then check("connect: sites." .. tostring(name) .. ": tls", tls, tls_options, level) end
  end
  if type(opts.reconnect) == "table" then check("connect: reconnect", opts.reconnect, Backoff.options, level) end
  if type(opts.recover) == "table" then check("connect: recover", opts.recover, recovery_options, level) end
  if opts.uri and opts.endpoints then error("connect: options 'uri' and 'endpoints' exclude each other", level) end
  return opts
end

local function default_log(level, text)
  if level == "warn" or level == "error" then
    io.stderr:write("moonrabbit: ", level == "warn" and "warning: " or "", text, "\n")
  end
end

--- The log to use: what it throws goes no further than this.
---@param log function?
---@param runtime table
---@return fun(level: string, text: string)
function connection_options.log(log, runtime)
  log = log or runtime.log or default_log
  return function(level, text)
    local logged, err = pcall(log, level, text)
    if logged then return end
    if err ~= nil and err == runtime.cancelled then error(err, 0) end
    default_log("error", "the option 'log' threw: " .. tostring(err))
    default_log(level, text)
  end
end

return connection_options
