--- Connection: to one broker, by `moonrabbit.connect`; it comes back when it is lost (docs/connections.md).
--
-- A connection is used from one thread; its tasks read and write whenever the event loop turns. In a
-- plain script with the native runtime the loop runs while a call waits, and only then: publishes and
-- acks leave with the next call that waits, when 256 KiB are waiting, or with `flush`.
--
-- @module moonrabbit.connection

local core = require "moonrabbit.core"
local options = require "moonrabbit.options"
local parts = require "moonrabbit.parts"
local runtimes = require "moonrabbit.runtime"
local uri = require "moonrabbit.uri"
local connection_options = require "moonrabbit.connection.options"
local events = require "moonrabbit.connection.events"
local supervisor = require "moonrabbit.connection.supervisor"
local Backoff = require "moonrabbit.connection.backoff"
local Record = require "moonrabbit.connection.record"
local Repairs = require "moonrabbit.connection.repairs"
local cluster = require "moonrabbit.cluster"
local pollable = require "moonrabbit.pollable"
local protect = require "moonrabbit.protect"

require "moonrabbit.message"
require "moonrabbit.confirmation"

local check, argument = options.check, options.argument

---@class moonrabbit.Connection : moonrabbit.Pollable
---@field call_timeout number seconds that its calls wait unless they say otherwise
---@field endpoint string     "host:port" of the broker
---@field package _session moonrabbit.Session  the current one; while the connection comes back, the one that was lost
local Connection = {}
Connection.__index = Connection
Connection.__name = "moonrabbit.Connection"

Connection.options = connection_options.schema
parts(Connection, events, supervisor)
pollable.extend(Connection, "Connection")

-- ---- Connecting -------------------------------------------------------------------------------------

-- What the source of targets may use of the connection.
local function hooks_of(self)
  return {
    connection = self,
    emit = function(event, ...) self:_event(event, ...) end,
    move = function(why) self:_move(why) end,
    dial_primary = function(source)
      return Connection.connect(cluster.probe_options(self._opts), nil, { secrets = self._secrets, source = source })
    end,
  }
end

-- The options `reconnect` and `recover`, filled in: policy and what to restore; nil: nothing comes back.
local function policies(opts)
  local policy, recover = opts.reconnect, opts.recover
  if policy == false then return nil, {} end
  if type(policy) ~= "table" then policy = {} end
  if recover == false then return policy, {} end
  if type(recover) ~= "table" then recover = {} end
  return policy, { topology = recover.topology ~= false, consumers = recover.consumers ~= false,
    filter = recover.filter }
end

--- Connects; used by moonrabbit.connect.
---@package
---@param given string|moonrabbit.ConnectOptions a URI or options
---@param level integer? of the caller, for errors
---@param heritage table? the same for connections that take each other's place: what one has learned, the next one knows
---@return moonrabbit.Connection|nil, moonrabbit.Error?
function Connection.connect(given, level, heritage)
  level = (level or 1) + 1
  local opts = connection_options.check(given, level)
  local runtime = runtimes.find(opts.runtime, level)
  local log = connection_options.log(opts.log, runtime)
  local source = cluster.source(opts, { runtime = runtime, log = log, past = heritage and heritage.source }, level)
  local health
  if opts.health then
    local heartbeat = math.huge
    for _, to in ipairs(source.targets) do heartbeat = math.min(heartbeat, to.heartbeat) end
    health = require("moonrabbit.health").checked("connect", opts.health, heartbeat, level)
  end
  local policy, recover = policies(opts)
  local self = setmetatable({
    call_timeout = opts.timeout or 30,
    _opts = opts, _runtime = runtime, _log = log, _source = source,
    _health = health,
    _policy = policy, _recover = recover, _backoff = Backoff.new(policy or {}),
    _record = policy and recover.topology and Record.new() or nil,
    _state = "connecting", _changed = runtime.condition(), _nudge = runtime.condition(),
    _channels = {}, -- those that survive, as keys
    _heritage = heritage,
    _secrets = heritage and heritage.secrets or {},  -- user -> what update_secret told the broker
    _listeners = {}, _events = {}, _first = 1, _last = 0, _event_bytes = 0,
  }, Connection)
  self._repairs = Repairs.new(self)
  if heritage then heritage.source, heritage.secrets = source, self._secrets end
  source:attach(hooks_of(self))
  local whole, connected, err = protect(self._start, self)
  if not whole then -- the task was cancelled
    source:close()
    error(connected, 0)
  end
  if not connected then return nil, err end
  return self
end

-- ---- Channels, publishers, consumers, calls ---------------------------------------------------------

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
  if channel then channel:_survive() end
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
  local whole, consumer
  whole, consumer, err = protect(Consumer.start, channel, queue, opts, handler, 3)
  if whole and consumer then
    consumer._owns_channel = true
    return consumer
  end
  channel:_abandon()
  if not whole then error(consumer, 0) end -- its task was cancelled, or an argument cannot be sent
  return nil, err
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

--- "open", "recovering", "closing" or "closed"; and, while it is not open, why.
---@return string state, moonrabbit.Error? reason
function Connection:state()
  return self._state, self._reason
end

--- Whether it is open.
---@return boolean
function Connection:is_open()
  return self._state == "open"
end

--- The reason when the broker has blocked publishing, else nil.
---@return string?
function Connection:blocked()
  return self._session.blocked
end

--- With the option `sites`: "primary" or "standby", and whether publishing is open there. nil without it.
---@return string? site, boolean? publishing
function Connection:site()
  local source = self._source
  if not source.release then return nil end
  return source.current, source.released == true
end

--- With the option `sites`: opens publishing at the standby, whatever its check says. At the primary it is open.
function Connection:release()
  if not self._source.release then error("Connection:release: the connection has no option 'sites'", 2) end
  self._source:release()
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

--- Gives the broker a new password or token without reconnecting (RabbitMQ 3.8 and later, OAuth 2). When the
--- connection is lost later, it logs in with it, unless the option `password` is a function: that one is called.
--- connection.update-secret
---@param secret string
---@param opts moonrabbit.UpdateSecretOptions?
---@return true|nil, moonrabbit.Error?
function Connection:update_secret(secret, opts)
  argument("Connection:update_secret", "secret", secret, options.string)
  opts = check("Connection:update_secret", opts, { reason = options.shortstr, timeout = options.seconds })
  local session = self._session
  if self._state ~= "open" then return nil, self:_closed_error() end
  local ok, status = session.engine:update_secret(secret, opts.reason or "refresh")
  if not ok then return nil, session:refusal(status, "Connection:update_secret") end
  session:keep_secret(secret)
  local result, err = session:await(session:expect(session.calls, "connection.update-secret"),
    opts.timeout or self.call_timeout)
  if not result then return nil, err end
  self._secrets[self._target.user] = secret
  return true
end

--- Runs `fn` and lets everything it publishes and settles leave together at its end (else 256 KiB leave as soon as
--- they are there). It holds back what the option `max_buffer` allows: what is more leaves before.
---@param fn function
---@param ... any its arguments
---@return true|nil, moonrabbit.Error?
function Connection:batch(fn, ...)
  argument("Connection:batch", "fn", fn, options.callback)
  local session = self._session
  session.corked = true
  fn(...)
  session.corked = false
  local ok, err = self:flush(self.call_timeout)
  return ok, err
end

--- Waits until everything published and settled so far has been handed to the network.
---@param timeout number? seconds
---@return true|nil, moonrabbit.Error?
function Connection:flush(timeout)
  if timeout ~= nil then argument("Connection:flush", "timeout", timeout, options.seconds) end
  if self._state == "recovering" then return nil, self:_closed_error() end
  local ok, err = self._session:flush(timeout or self.call_timeout)
  return ok, err
end

--- Sends what is waiting, acks included, says goodbye to the broker and waits for its answer. The
--- connection is closed afterwards, whatever comes back; closing again does nothing. One that is coming back is
--- closed at once.
---@param timeout number? seconds
---@return true|nil, moonrabbit.Error?
function Connection:close(timeout)
  if timeout ~= nil then argument("Connection:close", "timeout", timeout, options.seconds) end
  if self._state == "recovering" then
    self:_stop()
    return true
  end
  local ok, err = self._session:close(timeout or self.call_timeout)
  return ok, err
end

-- ---- What comes back --------------------------------------------------------------------------------

local function each_consumer(self, queue, fn)
  for channel in pairs(self._channels) do
    for _, consumer in pairs(channel._consumers) do
      if consumer.queue == queue then fn(consumer) end
    end
  end
end

--- A queue is about to be deleted, or was not after all (nil).
---@package
function Connection:_deletes(queue, deleted)
  each_consumer(self, queue, function(consumer) consumer._queue_deleted = deleted end)
end

--- A consumer on a queue was cancelled: an auto-delete queue without consumers is gone.
---@package
function Connection:_unused(queue)
  local record = self._record
  if not record or not record.queues[queue] then return end
  local used = false
  each_consumer(self, queue, function(consumer) used = used or not consumer._ended end)
  if not used then record:unused(queue) end
end

function Connection:__tostring()
  return ("%s (%s, %s)"):format(Connection.__name, self._target and uri.redacted(self._target) or "-",
    self._state)
end

--- Lua 5.4: `local conn <close> = …` says goodbye without waiting for the answer.
function Connection:__close()
  local session = self._session
  if self._state == "recovering" then
    self:_stop()
  elseif session and session.state == "open" then
    session:start_close()
    session:try_flush()
  end
end

Connection.core = core

return Connection
