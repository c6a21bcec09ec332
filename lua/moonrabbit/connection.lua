--- Connection: to one broker, by `moonrabbit.connect`.
--
-- A connection is used from one thread; its tasks read and write whenever the event loop turns. In a
-- plain script with the native runtime the loop runs while a call waits, and only then: publishes and
-- acks leave with the next call that waits, when 256 KiB are waiting, or with `flush`.
--
-- @module moonrabbit.connection

local core = require "moonrabbit.core"
local errors = require "moonrabbit.errors"
local options = require "moonrabbit.options"
local runtimes = require "moonrabbit.runtime"
local uri = require "moonrabbit.uri"
local Session = require "moonrabbit.session"
local pcall = require "moonrabbit.protect"

require "moonrabbit.message"
require "moonrabbit.confirmation"

local check, argument = options.check, options.argument

---@class moonrabbit.ConnectOptions
---@field uri string?              `amqp[s]://user:password@host:port/vhost?query`; "amqp://" by default. See moonrabbit.uri
---@field endpoints string[]?      URIs instead of `uri`; tried in order until one takes us
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
---@field max_buffer integer?      bytes of output that may wait; 16 MiB by default. Past it a publish waits
---@field ack_delay number?        seconds that an ack may wait for others to go with; 0.001 by default
---@field health ("fixed"|"adaptive"|"consecutive"|moonrabbit.HealthOptions|false)?  how the broker's silence is judged; by default, and at the latest, nothing heard for two heartbeat intervals ends the connection. See moonrabbit.health
---@field runtime (string|table)?  a name or a runtime (docs/internals.md); "native" by default, and never guessed
---@field log fun(level: string, text: string)?  level: "debug", "info", "warn" or "error"; by default warnings and errors go to stderr

---@class moonrabbit.TlsOptions
---@field ca string?           file or folder of trusted certificates (PEM); the system's by default
---@field cert string?         client certificate (PEM)
---@field key string?          its key (PEM)
---@field verify boolean?      certificate and host name; true by default
---@field server_name string?  name to verify and to send as SNI; the host by default
---@field min_version ("1.2"|"1.3")?  "1.2" by default

---@class moonrabbit.Connection
---@field timeout number     seconds that its calls wait unless they say otherwise
---@field endpoint string     "host:port" of the broker
---@field package _session moonrabbit.Session
local Connection = {}
Connection.__index = Connection
Connection.__name = "moonrabbit.Connection"

local tls_options = {
  ca = options.string, cert = options.string, key = options.string, verify = options.boolean,
  server_name = options.string, min_version = options.one_of("1.2", "1.3"),
}

local function endpoint_list(value)
  if type(value) ~= "table" or #value == 0 then return "a list of URIs" end
  for i = 1, #value do
    if type(value[i]) ~= "string" then return "a list of URIs" end
  end
end

local connect_options = {
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
  runtime = options.either(options.string, options.table),
  log = options.callback,
  health = options.either(options.boolean, options.string, options.table),
}
Connection.options = connect_options

local function default_log(level, text)
  if level == "warn" or level == "error" then
    io.stderr:write("moonrabbit: ", level == "warn" and "warning: " or "", text, "\n")
  end
end

-- What a log throws goes no further than this.
local function careful(log, runtime)
  return function(level, text)
    local logged, err = pcall(log, level, text)
    if logged then return end
    if err ~= nil and err == runtime.cancelled then error(err, 0) end
    default_log("error", "the option 'log' threw: " .. tostring(err))
    default_log(level, text)
  end
end

-- ---- Connecting -------------------------------------------------------------------------------------

-- What one URI and the options make together.
local function target(text, opts)
  local parsed, problem = uri.parse(text)
  if not parsed then return nil, problem end
  parsed.vhost = opts.vhost or parsed.vhost
  parsed.user = opts.user or parsed.user or "guest"
  -- A user without a password gets the default one, as in the other clients.
  if opts.password ~= nil then parsed.password = opts.password else parsed.password = parsed.password or "guest" end
  parsed.mechanism = opts.mechanism or parsed.mechanism or "PLAIN"
  parsed.heartbeat = opts.heartbeat or parsed.heartbeat or 60
  parsed.frame_max = opts.frame_max or parsed.frame_max
  parsed.channel_max = opts.channel_max or parsed.channel_max
  parsed.connect_timeout = opts.connect_timeout or parsed.connect_timeout or 10
  if opts.tls ~= nil then
    if opts.tls == false then
      parsed.tls = nil
    else
      if not parsed.tls and parsed.port == 5672 and not parsed.port_given then parsed.port = 5671 end
      parsed.tls = parsed.tls or { verify = true }
      if type(opts.tls) == "table" then
        for key, value in pairs(opts.tls) do parsed.tls[key] = value end
      end
    end
  end
  if parsed.tls then parsed.tls.server_name = parsed.tls.server_name or parsed.host end
  if parsed.mechanism == "PLAIN" and parsed.user:find "%z" then
    return nil, "option 'user' holds a zero byte"
  end
  return parsed
end

local function client_properties(opts)
  if not opts.name then return opts.client_properties end
  local all = {}
  for key, value in pairs(opts.client_properties or {}) do all[key] = value end
  all.connection_name = opts.name
  return all
end

-- One attempt at one broker.
local function dial(self, to, deadline)
  local opts = self._opts
  local label = uri.endpoint(to)
  local password = to.password
  if type(password) == "function" then
    local problem
    password, problem = password()
    if type(password) ~= "string" then
      return nil, errors.new { kind = "auth", endpoint = label, temporary = true,
        message = "the password function gave no password" .. (problem and ": " .. tostring(problem) or "") }
    end
  end
  local external = to.mechanism == "EXTERNAL"
  return Session.open {
    runtime = self._runtime,
    endpoint = { host = to.host, port = to.port, path = to.path },
    label = label,
    tls = to.tls,
    timeout = deadline and math.min(to.connect_timeout, math.max(0, deadline - self._runtime.now()))
      or to.connect_timeout,
    -- Whatever a broker says, the password is not repeated from it.
    secret = not external and password ~= to.user and password or nil,
    log = self._log,
    emit = self._emitter,
    health = self._health,
    engine = {
      vhost = to.vhost, user = not external and to.user or nil, password = not external and password or nil,
      mechanism = to.mechanism, heartbeat = to.heartbeat, frame_max = to.frame_max, channel_max = to.channel_max,
      max_message_size = opts.max_message_size, max_buffer = opts.max_buffer, ack_delay = opts.ack_delay,
      client_properties = client_properties(opts),
    },
  }
end

--- Connects; used by moonrabbit.connect.
---@package
---@param given string|moonrabbit.ConnectOptions a URI or options
---@param level integer? of the caller, for errors
---@param deadline number? for all endpoints together, in the runtime's time
---@return moonrabbit.Connection|nil, moonrabbit.Error?
function Connection.connect(given, level, deadline)
  level = (level or 1) + 1
  local opts = given
  if type(given) == "string" then
    opts = { uri = given }
  elseif type(given) ~= "table" then
    error("connect: a URI or a table of options expected, not a " .. type(given), level)
  end
  check("connect", opts, connect_options, level)
  if type(opts.tls) == "table" then check("connect: tls", opts.tls, tls_options, level) end
  if opts.uri and opts.endpoints then error("connect: options 'uri' and 'endpoints' exclude each other", level) end
  local targets = {}
  for i, text in ipairs(opts.endpoints or { opts.uri or "amqp://" }) do
    local problem
    targets[i], problem = target(text, opts)
    if not targets[i] then error("connect: " .. problem, level) end
  end
  local health
  if opts.health then
    local heartbeat = math.huge
    for _, to in ipairs(targets) do heartbeat = math.min(heartbeat, to.heartbeat) end
    health = require("moonrabbit.health").checked("connect", opts.health, heartbeat, level)
  end
  local runtime = runtimes.find(opts.runtime, level)
  local self = setmetatable({
    timeout = opts.timeout or 30,
    _opts = opts, _runtime = runtime, _log = careful(opts.log or runtime.log or default_log, runtime),
    _health = health, _listeners = {}, _events = {}, _first = 1, _last = 0, _state = "connecting",
  }, Connection)
  self._emitter = function(event, ...) self:_event(event, ...) end
  local err
  for _, to in ipairs(targets) do
    local session
    session, err = dial(self, to, deadline)
    if session then
      self._session = session
      self._target = to
      self.endpoint = session.endpoint
      self._log("debug", "connected to " .. uri.redacted(to))
      self:_event("open")
      self:_event("state", "open")
      return self
    end
  end
  return nil, err
end

-- ---- Events -----------------------------------------------------------------------------------------

local events = {
  open = true, closed = true, state = true, blocked = true, unblocked = true, ["return"] = true, error = true,
  suspect = true,
}

--- Calls `fn` on an event. The calls come one after the other, in a task of their own:
---
--- * "open" (); "closed" (err): err.temporary tells whether connecting again can help
--- * "state" (state, err): "open", "closing", "closed"
--- * "blocked" (reason), "unblocked" (): https://www.rabbitmq.com/docs/connection-blocked
--- * "suspect" (strategy, details): the broker's silence is going to end the connection (moonrabbit.health)
--- * "return" (message, channel): an unroutable publish came back
--- * "error" (text, message): a handler threw; with no listener it is logged
---@param event "open"|"closed"|"state"|"blocked"|"unblocked"|"suspect"|"return"|"error"
---@param fn function   it may wait; what it throws is logged
---@return function off takes `fn` off again
function Connection:on(event, fn)
  if not events[event] then
    local hint = type(event) == "string" and options.nearest(event, events)
    error("Connection:on: there is no event '" .. tostring(event) .. "'"
      .. (hint and " (did you mean '" .. hint .. "'?)" or ""), 2)
  end
  argument("Connection:on", "fn", fn, options.callback)
  local list = self._listeners[event] or {}
  self._listeners[event] = list
  list[#list + 1] = fn
  return function()
    for i = #list, 1, -1 do
      if list[i] == fn then table.remove(list, i) end
    end
  end
end

local unpack = table.unpack or unpack -- luacheck: ignore 143 113

-- Runs queued functions in their order, in one task that ends when there are none.
local function deliver_events(self)
  local queue, count = self._events, 0
  while self._first <= self._last do
    local item = queue[self._first]
    queue[self._first] = nil
    self._first = self._first + 1
    count = count + 1
    if count % 64 == 0 then self._runtime.sleep(0) end
    item[1](unpack(item, 2, item.n))
  end
  self._first, self._last = 1, 0
end

local function dispatcher(self)
  self._runtime.spawn(function()
    -- What throws must not keep the later events from being delivered.
    repeat
      local ok, err = pcall(deliver_events, self)
      if not ok then
        if err == self._runtime.cancelled and err ~= nil then break end
        self._log("error", "an event listener threw: " .. tostring(err))
      end
    until ok
    self._delivering = nil
  end)
end

--- Queues calls of listeners; never yields.
---@package
function Connection:_dispatch(list, ...)
  local n = select("#", ...)
  for i = 1, #list do
    self._last = self._last + 1
    self._events[self._last] = { list[i], n = n + 1, ... }
  end
  if not self._delivering then
    self._delivering = true
    dispatcher(self)
  end
end

---@package
function Connection:_event(event, ...)
  local list = self._listeners[event]
  if list and #list > 0 then self:_dispatch(list, ...) end
  if event == "closed" then
    list = self._listeners.state
    if list and #list > 0 then self:_dispatch(list, "closed", ...) end
  end
end

--- Reports what nobody waits for.
---@package
function Connection:_report(event, text, message)
  local list = self._listeners[event]
  if list and #list > 0 then
    self:_dispatch(list, text, message)
  else
    self._log("error", text)
  end
end

-- ---- Channels, publishers, consumers, calls ---------------------------------------------------------------------------------

---@class moonrabbit.ChannelOptions
---@field confirm boolean?   the broker confirms publishes; false by default
---@field prefetch integer?  as in Channel:qos; by default each consumer chooses
---@field window integer?    the most publishes that may be unconfirmed, counted from the oldest such; 65536 by default, 0: no bound
---@field timeout number?    seconds, of this call and of the channel's; the connection's by default

--- Opens a channel. A connection may have many, and each task should have its own: an error of kind
--- `channel` ends all that a channel was used for.
--- err.kind: `overflow` when as many channels as the broker allows are open; `timeout`, `closed`.
---@param opts moonrabbit.ChannelOptions?
---@return moonrabbit.Channel|nil, moonrabbit.Error?
function Connection:channel(opts)
  local Channel = require "moonrabbit.channel"
  local channel, err = Channel.open(self, self._session, opts, 2)
  return channel, err
end

--- A publisher on a confirm channel of its own: a route prepared once. See moonrabbit.publisher.
---@param opts moonrabbit.PublisherOptions?
---@return moonrabbit.Publisher|nil, moonrabbit.Error?
function Connection:publisher(opts)
  local publisher, err = require("moonrabbit.publisher").new(self, opts, 2)
  return publisher, err
end

--- A consumer on a channel of its own, which is closed when it is cancelled.
---@param queue string
---@param opts moonrabbit.ConsumeOptions? as for Channel:consume; may be left out before a handler
---@param handler fun(message: moonrabbit.Message)? runs in tasks; without one take messages from the consumer
---@return moonrabbit.Consumer|nil, moonrabbit.Error?
function Connection:consume(queue, opts, handler)
  local Consumer = require "moonrabbit.consumer"
  argument("Connection:consume", "queue", queue, options.shortstr)
  if type(opts) == "function" and handler == nil then opts, handler = nil, opts end
  opts = check("Connection:consume", opts, Consumer.options)
  if handler ~= nil then argument("Connection:consume", "handler", handler, options.callback) end
  local channel, err = self:channel()
  if not channel then return nil, err end
  local consumer
  consumer, err = Consumer.start(channel, queue, opts, handler, 2)
  if not consumer then
    channel:_abandon()
    return nil, err
  end
  consumer._owns_channel = true
  return consumer
end

---@class moonrabbit.CallOptions : moonrabbit.PublishOptions
---@field reply_to nil
---@field correlation_id nil
---@field mandatory nil
---@field persistent boolean?  false by default
---@field timeout number?      seconds until the reply must be there; the connection's by default

--- A remote call: publishes a request and waits for its reply, over direct reply-to (no reply queue
--- is declared; https://www.rabbitmq.com/docs/direct-reply-to). Whoever consumes the request answers
--- with `msg:reply(body)`.
--- err.kind: `timeout`, `unroutable` (at once, when no queue takes the request), `closed`, `channel`.
---@param body string
---@param opts moonrabbit.CallOptions
---@return moonrabbit.Message|nil reply, moonrabbit.Error?
function Connection:call(body, opts)
  argument("Connection:call", "body", body, options.string)
  local Rpc = require "moonrabbit.rpc"
  check("Connection:call", opts, Rpc.options)
  self._rpc = self._rpc or Rpc.new(self)
  local reply, err = self._rpc:call(body, opts or {})
  return reply, err
end

--- "connecting", "open", "closing" or "closed"; and, once closed, why.
---@return string state, moonrabbit.Error? reason
function Connection:state()
  local session = self._session
  return session.state, session.reason
end

--- Whether it is open.
---@return boolean
function Connection:is_open()
  return self._session.state == "open"
end

--- The reason when the broker has blocked publishing, else nil.
---@return string?
function Connection:blocked()
  return self._session.blocked
end

--- What the broker said about itself (`product`, `version`, `cluster_name`, `platform`, and all of it in
--- `properties`), and what both sides agreed on: `channel_max`, `frame_max` (bytes), `heartbeat` (seconds).
---@return { product: string?, version: string?, cluster_name: string?, platform: string?, properties: table, channel_max: integer, frame_max: integer, heartbeat: integer }
function Connection:server()
  local session = self._session
  if not self._server or self._server_of ~= session then
    local properties = session.engine:server_properties() or {}
    self._server_of = session
    self._server = {
      product = properties.product, version = properties.version, platform = properties.platform,
      cluster_name = properties.cluster_name, properties = properties,
      channel_max = session.channel_max, frame_max = session.frame_max, heartbeat = session.heartbeat,
    }
  end
  return self._server
end

---@class moonrabbit.UpdateSecretOptions
---@field reason string?   for the broker's log; "refresh" by default
---@field timeout number?  seconds

--- Gives the broker a new password or token without reconnecting (RabbitMQ 3.8 and later, OAuth 2).
--- connection.update-secret
---@param secret string
---@param opts moonrabbit.UpdateSecretOptions?
---@return true|nil, moonrabbit.Error?
function Connection:update_secret(secret, opts)
  argument("Connection:update_secret", "secret", secret, options.string)
  opts = check("Connection:update_secret", opts, { reason = options.shortstr, timeout = options.seconds })
  local session = self._session
  if session.state ~= "open" then return nil, self:_closed_error() end
  local ok, status = session.engine:update_secret(secret, opts.reason or "refresh")
  if not ok then return nil, session:refusal(status, "Connection:update_secret") end
  session:keep_secret(secret)
  local result, err = session:await(session:expect(session.calls, "connection.update-secret"),
    opts.timeout or self.timeout)
  if not result then return nil, err end
  return true
end

function Connection:_closed_error()
  local session = self._session
  return session.reason or session:error("closed", "the connection is closing", { temporary = false })
end

--- Runs `fn` and lets everything it publishes and settles leave together at its end, whatever its
--- size (else 256 KiB leave as soon as they are there).
---@param fn function
---@param ... any its arguments
---@return true|nil, moonrabbit.Error?
function Connection:batch(fn, ...)
  argument("Connection:batch", "fn", fn, options.callback)
  local session = self._session
  session.corked = true
  fn(...)
  session.corked = false
  local ok, err = session:flush(self.timeout)
  return ok, err
end

--- Waits until everything published and settled so far has been handed to the network.
---@param timeout number? seconds
---@return true|nil, moonrabbit.Error?
function Connection:flush(timeout)
  if timeout ~= nil then argument("Connection:flush", "timeout", timeout, options.seconds) end
  local ok, err = self._session:flush(timeout or self.timeout)
  return ok, err
end

--- Sends what is waiting, acks included, says goodbye to the broker and waits for its answer. The
--- connection is closed afterwards, whatever comes back; closing again does nothing.
---@param timeout number? seconds
---@return true|nil, moonrabbit.Error?
function Connection:close(timeout)
  if timeout ~= nil then argument("Connection:close", "timeout", timeout, options.seconds) end
  local ok, err = self._session:close(timeout or self.timeout)
  return ok, err
end

function Connection:__tostring()
  return ("%s (%s, %s)"):format(Connection.__name, self._target and uri.redacted(self._target) or "-",
    self._session and self._session.state or self._state)
end

--- Lua 5.4: `local conn <close> = …` says goodbye without waiting for the answer.
function Connection:__close()
  local session = self._session
  if session and session.state == "open" then
    session:start_close()
    session:try_flush()
  end
end

Connection.core = core

return Connection
