--- Publisher: a route prepared once, on a confirm channel of its own, that keeps each message until its confirm.
--
-- Exchange, routing key and properties are encoded when it is made; each send adds the body. Messages
-- are mandatory and persistent unless told otherwise, so that `true` means what it says: a queue has it.
--
-- What is not confirmed goes again, in its order and before anything newer, when the connection has come back; what
-- the broker refused (basic.nack) goes again after a pause, and what no queue took where `retry.on_return` says so.
-- Each message has a `message_id` (one is made where none is given) that stays the same, and what is sent again has
-- the header `moonrabbit-resent`: it may come twice, and consumers can tell. `window = 1` keeps the order strictly.
-- `retry = false` turns all that off: then each message is sent once, and its outcome is `closed` when the
-- connection is lost. docs/publishing.md says what is promised.
-- @module moonrabbit.publisher

local core = require "moonrabbit.core"
local options = require "moonrabbit.options"
local protect = require "moonrabbit.protect"
local Keeper = require "moonrabbit.publisher.keeper"
local Outbox = require "moonrabbit.publisher.outbox"
local Policy = require "moonrabbit.publisher.policy"
local ids = require "moonrabbit.publisher.ids"
local trace = require "moonrabbit.trace"

local min, huge = math.min, math.huge

---@class moonrabbit.PublisherOptions : moonrabbit.PublishOptions
---@field persistent boolean?   a durable queue keeps the messages on disk; true by default
---@field mandatory boolean?    a message that no queue takes comes back, as a failure of kind `unroutable`; true by default
---@field window integer?       the most messages that may be unconfirmed, counted from the oldest such; 65536 by default, 0: no bound
---@field timeout number?       seconds, of this call and of the publisher's; the connection's by default
---@field retry (boolean|moonrabbit.PublisherRetry)?  what is sent again, and when; true by default: as the defaults of its fields say
---@field max_kept integer?     the most messages that are kept, on the wire or waiting for it, counted from the oldest unsettled one; the window by default
---@field max_kept_bytes number? the most bytes of bodies that are kept; 64 MiB by default
---@field outbox ("memory"|moonrabbit.OutboxOptions)?  where messages are stored until they are confirmed, to outlive failures ("memory") or the process (`kind = "sqlite"`)

---@class moonrabbit.Publisher
---@field channel moonrabbit.Channel its own
---@field timeout number seconds that its calls wait unless they say otherwise
local Publisher = {}
Publisher.__index = Publisher
Publisher.__name = "moonrabbit.Publisher"

local publisher_options = options.merge(options.publish, {
  window = options.integer(0, 4294967295), timeout = options.seconds,
  retry = Policy.kind, outbox = Outbox.kind,
  max_kept = options.integer(1, 9007199254740991), max_kept_bytes = options.number(1),
})
local send_options = options.merge(options.publish, { timeout = options.seconds })

local DEFAULT_WINDOW = 65536
local MAX_KEPT_BYTES = 64 * 1024 * 1024

-- The engine's method, taken from the first channel.
local core_publish_route

-- ---- Making one -------------------------------------------------------------------------------------

local function with_header(base, name, value)
  local all, headers = {}, {}
  for key, each in pairs(base) do all[key] = each end
  for key, each in pairs(base.headers or {}) do headers[key] = each end
  headers[name] = value
  all.headers = headers
  return all
end

-- The route, and the same with the mark of what is sent again; stamped with an id for each message.
local function routes(self)
  local base = {}
  for key, value in pairs(self._base) do base[key] = value end
  base.message_id = self._id .. ids.ROOM
  local marked = with_header(base, "moonrabbit-resent", true)
  return core.route(base, true), core.route(marked, true)
end

local function keep(self, opts, policy, outbox)
  self._id = ids.prefix()
  local route, again = routes(self)
  local window = opts.window or DEFAULT_WINDOW
  local keeper = Keeper.new {
    channel = self.channel, route = route, again = again, policy = policy, window = window,
    most = opts.max_kept or (window > 0 and window or huge), most_bytes = opts.max_kept_bytes or MAX_KEPT_BYTES,
    outbox = outbox,
  }
  self._keeper, self._ring, self._route = keeper, keeper.ring, route
  self._most_bytes = opts.max_kept_bytes or MAX_KEPT_BYTES
  -- Where every message is packed by itself: an id of the user's would be the same for all, an outbox stores them.
  self._packs = outbox ~= nil or self._base.message_id ~= nil
  keeper:attach(self.channel)
  return self
end

local function split(opts)
  local base = {}
  for key, value in pairs(opts) do
    if options.publish[key] then base[key] = value end
  end
  return base
end

--- Used by Connection:publisher.
---@package
function Publisher.new(connection, opts, level)
  level = level + 1
  opts = options.check("Connection:publisher", opts, publisher_options, level)
  local policy = Policy.new(opts.retry, "Connection:publisher", level)
  if not policy and (opts.outbox or opts.max_kept or opts.max_kept_bytes) then
    error("Connection:publisher: 'outbox', 'max_kept' and 'max_kept_bytes' need `retry`, which is false", level)
  end
  local base = split(opts)
  local route = core.route(base, true)
  local outbox, err
  if opts.outbox then
    outbox, err = Outbox.open(opts.outbox, "Connection:publisher", level, connection._runtime, connection._log)
    if not outbox then return nil, err end
  end
  local whole, channel
  whole, channel, err = protect(connection.channel, connection,
    { confirm = true, window = opts.window, timeout = opts.timeout })
  if not whole or not channel then
    if outbox then outbox:close() end
    if not whole then error(channel, 0) end -- its task was cancelled
    return nil, err
  end
  core_publish_route = core_publish_route or channel._core.publish_route
  local self = setmetatable({ channel = channel, timeout = channel.timeout, _base = base, _route = route }, Publisher)
  if policy then return keep(self, opts, policy, outbox) end
  return self
end

-- ---- Sending ----------------------------------------------------------------------------------------

-- The publisher's options with a message's own over them; headers are merged too.
local function with(self, overrides, level)
  options.check("Publisher:send", overrides, send_options, level + 1)
  local all = {}
  for key, value in pairs(self._base) do all[key] = value end
  for key, value in pairs(overrides) do all[key] = value end
  if overrides.headers and self._base.headers then
    all.headers = {}
    for key, value in pairs(self._base.headers) do all.headers[key] = value end
    for key, value in pairs(overrides.headers) do all.headers[key] = value end
  end
  return all
end

-- A message with properties of its own, as the keeper wants it.
local function pack(self, body, all)
  all.message_id = all.message_id or self._id .. ids.stamp(self._ring.last + 1)
  local exchange, key, mandatory, props = core.pack(all, true)
  if not exchange then return nil, self.channel._session:refusal(key, "Publisher:send") end
  return { body = body, exchange = exchange, routing_key = key, mandatory = mandatory, props = props }
end

-- Waits for room until the deadline, and takes the message.
local function accept(self, body, all, deadline, timeout)
  local keeper = self._keeper
  local ok, err = keeper:room(deadline, timeout)
  if not ok then return nil, err end
  local message = body
  if all then
    message, err = pack(self, body, all)
    if not message then return nil, err end
  end
  local confirmation
  confirmation, err = keeper:take(message)
  return confirmation, err
end

-- The slower way in, for whatever the quick one is not made for.
local function offer(self, body, overrides, level)
  options.argument("Publisher:send", "body", body, options.string, level + 1)
  local all
  if overrides then all = with(self, overrides, level + 1) elseif self._packs then all = split(self._base) end
  local timeout = all and all.timeout or self.timeout
  local confirmation, err = accept(self, body, all, self._keeper.runtime.now() + timeout, timeout)
  return confirmation, err
end

-- The overrides, with the trace of what is handled; the publisher's own headers come first.
local function traced(self, overrides)
  local headers = self._base.headers
  if headers and headers.traceparent ~= nil then return overrides end
  return trace.add(self.channel._runtime, overrides)
end

local function send_once(self, body, overrides)
  local channel = self.channel
  if overrides then
    local confirmation, err = channel:publish_async(body, with(self, overrides, 3))
    return confirmation, err
  end
  return channel:_publish_route(self._route, body)
end

--- Sends and returns at once: the Confirmation tells how it ends, whatever connection that takes.
--- It waits only where there is no room: as much is kept as may be (`max_kept`, `max_kept_bytes`), for the
--- broker is away, has blocked publishing, or is slow. err.kind is then `overflow` or `blocked` after
--- `timeout` (0: it never waits), and the message was not taken. `outbox`: it could not be stored, and was not taken.
---@param body string
---@param overrides moonrabbit.PublishOptions? as for Channel:publish, for this message; headers are merged
---@return moonrabbit.Confirmation|nil, moonrabbit.Error?
function Publisher:send_async(body, overrides)
  if trace.on then overrides = traced(self, overrides) end
  local keeper = self._keeper
  if not keeper then
    local confirmation, err = send_once(self, body, overrides)
    return confirmation, err
  end
  local ring = self._ring
  local n = ring.last + 1
  if n <= keeper.fast and overrides == nil and not self._packs then
    local channel = self.channel
    local confirmation, flush = core_publish_route(channel._core, self._route, body, n)
    if confirmation then
      local at = (n - 1) % ring.size + 1
      ring.confirmations[at], ring.kept[at] = confirmation, body
      local bytes = ring.bytes + #body
      ring.last, ring.bytes = n, bytes
      if bytes >= self._most_bytes then keeper.fast = 0 end
      local session = channel._session
      if flush then
        session:try_flush()
      elseif not session.dirty then
        session:touch()
      end
      return confirmation
    end
  end
  local confirmation, err = offer(self, body, overrides, 2)
  return confirmation, err
end

--- Sends and waits for the broker's confirm: true once a queue has the message (and, where it is durable and the
--- message persistent, has it on disk), however often it had to be sent.
--- err.kind: `nacked`, `unroutable`, `timeout`, `blocked`, `overflow`, `closed`, `channel`, `outbox`. `timeout` means that
--- the outcome is unknown, and the message may still go out or arrive, unless err.unsent: it was never sent, and
--- was taken back.
---@param body string
---@param overrides moonrabbit.PublishOptions? as for Channel:publish, for this message; headers are merged
---@return true|nil, moonrabbit.Error?
function Publisher:send(body, overrides)
  options.argument("Publisher:send", "body", body, options.string)
  if trace.on then overrides = traced(self, overrides) end
  local keeper = self._keeper
  if not keeper then
    local channel = self.channel
    if overrides then
      local ok, err = channel:publish(body, with(self, overrides, 2))
      return ok, err
    end
    return channel:_send_route(self._route, body)
  end
  local now, timeout = keeper.runtime.now, self.timeout
  if overrides then timeout = options.check("Publisher:send", overrides, send_options).timeout or timeout end
  local deadline = now() + timeout
  local confirmation, err
  if overrides then
    confirmation, err = offer(self, body, overrides, 2)
  else
    confirmation, err = self:send_async(body)
  end
  if not confirmation then return nil, err end
  return keeper:_wait(confirmation, min(timeout, math.max(0, deadline - now())), true)
end

-- ---- Waiting, closing -------------------------------------------------------------------------------

--- Waits until everything sent is settled: true when all since the last call were acked. Else err.failed is a list of
--- { seq, outcome, err }, without those whose failure `send` has returned already; on a `timeout` err.pending
--- tells how many are not settled yet. err.kind is otherwise the first failure's.
---@param timeout number? seconds
---@return true|nil, moonrabbit.Error?
function Publisher:wait(timeout)
  if timeout ~= nil then options.argument("Publisher:wait", "timeout", timeout, options.seconds) end
  local keeper = self._keeper
  local ok, err
  if keeper then
    ok, err = keeper:wait(timeout or self.timeout)
  else
    ok, err = self.channel:wait_for_confirms(timeout)
  end
  return ok, err
end

--- How many messages are not settled yet, on the wire or waiting for it.
---@return integer
function Publisher:unconfirmed()
  local keeper = self._keeper
  return keeper and keeper:unconfirmed() or self.channel:unconfirmed()
end

--- How many messages it keeps: `unconfirmed` of `bytes`, `unsent` of them not on the wire; how often it has sent one again (`resent`);
--- and how many its outbox holds (`stored`), those that have failed and go again later included.
---@return { unconfirmed: integer, unsent: integer, bytes: integer, resent: integer, stored: integer }
function Publisher:stats()
  local keeper = self._keeper
  if keeper then return keeper:stats() end
  return { unconfirmed = self.channel:unconfirmed(), unsent = 0, bytes = 0, resent = 0, stored = 0 }
end

--- Closes its channel, and its outbox; wait() before, or the outcome of what is under way stays unknown (what is in
--- an outbox file goes again with the next publisher that opens it).
---@param timeout number? seconds
---@return true|nil, moonrabbit.Error?
function Publisher:close(timeout)
  if timeout ~= nil then options.argument("Publisher:close", "timeout", timeout, options.seconds) end
  if self._keeper then self._keeper:close() end
  return self.channel:close(timeout)
end

function Publisher:__tostring()
  return ("%s to '%s' '%s'"):format(Publisher.__name, self._base.exchange or "", self._base.routing_key or "")
end

function Publisher:__close()
  if self._keeper then self._keeper:close() end
  self.channel:__close()
end

return Publisher
