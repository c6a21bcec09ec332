--- Consumer: messages as they come.
--
-- Three ways to take them, one for each consumer:
--
-- * `for msg in consumer:messages() do … end`
-- * `consumer:receive(timeout)`, the primitive beneath it. PUC Lua 5.1 cannot yield inside a generic
--   `for`, so its coroutines (tasks) use this one.
-- * a handler, given to `consume`: it runs in tasks that are used again from message to message, at
--   most `concurrency` at once.
--
-- A handler settles its message itself. When it throws, the error is reported with its traceback (the
-- connection's "error" event, or the log), and if the message is not settled yet it goes back to its
-- queue after `error_delay` seconds: at once it would come back at once.
-- @module moonrabbit.consumer

local core = require "moonrabbit.core"
local described = require "moonrabbit.described"
local options = require "moonrabbit.options"
local yielding_pcall = require "moonrabbit.protect"
local survival = require "moonrabbit.consumer.survival"
local pollable = require "moonrabbit.pollable"

local huge = math.huge

---@class moonrabbit.ConsumeOptions
---@field tag string?         consumer tag; one is made up by default
---@field no_ack boolean?     the broker forgets each message as it sends it: a crash loses some; false by default
---@field exclusive boolean?  no other consumer on the queue; false by default
---@field no_local boolean?   ignored by RabbitMQ
---@field priority integer?   of a lower one messages come only while the others have all they may; 0 by default. https://www.rabbitmq.com/docs/consumer-priority
---@field prefetch integer?   unsettled deliveries the broker may have out to it; 0: no bound; the channel's by default, else 250
---@field concurrency integer? how many handlers run at once; the prefetch by default
---@field error_delay number? seconds before the message of a handler that threw is requeued; 1 by default
---@field arguments table?    such as `x-stream-offset`
---@field timeout number?     seconds to wait for the broker's answer; the channel's by default

---@class moonrabbit.Consumer : moonrabbit.Pollable
---@field channel moonrabbit.Channel
---@field queue string
---@field tag string           what the broker calls it
---@field prefetch integer     0: no bound
---@field concurrency integer? with a handler
local Consumer = {}
Consumer.__index = Consumer
Consumer.__name = "moonrabbit.Consumer"

survival.extend(Consumer)
pollable.extend(Consumer, "Consumer")

-- Prefetch of an acking consumer for which nobody chose one. RabbitMQ's advice is 100 to 300
-- (https://www.rabbitmq.com/docs/confirms#channel-qos-prefetch-throughput).
local DEFAULT_PREFETCH = 250

local consume_options = {
  tag = options.shortstr,
  no_ack = options.boolean,
  exclusive = options.boolean,
  no_local = options.boolean,
  priority = options.integer(-2147483648, 2147483647),
  prefetch = options.integer(0, 65535),
  concurrency = options.integer(1, 1000000),
  error_delay = options.seconds,
  arguments = options.table,
  timeout = options.seconds,
}

local serial, started = 0, 0

local function choose_tag(opts)
  if opts.tag and opts.tag ~= "" then return opts.tag end
  serial = serial + 1
  return ("moonrabbit-%d"):format(serial)
end

local function all_arguments(opts)
  if not opts.priority then return opts.arguments end
  local all = {}
  for key, value in pairs(opts.arguments or {}) do all[key] = value end
  all["x-priority"] = opts.priority
  return all
end

local function choose_prefetch(channel, queue, opts)
  if opts.no_ack then return 0 end
  local prefetch = opts.prefetch or channel._prefetch or (channel._prefetch_global and 0)
  if not prefetch then
    prefetch = DEFAULT_PREFETCH
    channel._session.log("info", ("consumer on '%s': no prefetch given, using %d"):format(queue, prefetch))
  end
  return prefetch
end

--- Starts one; used by Channel:consume.
---@package
function Consumer.start(channel, queue, opts, handler, level)
  level = level + 1
  local what = "Channel:consume"
  options.argument(what, "queue", queue, options.shortstr, level)
  if type(opts) == "function" and handler == nil then opts, handler = nil, opts end
  opts = options.check(what, opts, consume_options, level)
  if handler ~= nil then options.argument(what, "handler", handler, options.callback, level) end
  if channel._closed then return nil, channel._closed end

  local session, runtime = channel._session, channel._runtime
  local tag = choose_tag(opts)
  if channel._consumers[tag] then error(what .. ": this channel has a consumer with that tag already", level) end
  if queue == "" then queue = channel._last_queue or queue end
  local prefetch = choose_prefetch(channel, queue, opts)
  started = started + 1
  local self = setmetatable({
    channel = channel, connection = channel.connection, queue = queue, tag = tag, prefetch = prefetch,
    no_ack = opts.no_ack or false, kind = "consumer",
    _opts = opts, _session = session, _runtime = runtime, _serial = started,
    _reads_stream = opts.arguments ~= nil and opts.arguments["x-stream-offset"] ~= nil,
    _ready = runtime.condition(), _receiving = 0,
  }, Consumer)
  if handler then
    self.concurrency = opts.concurrency or (prefetch > 0 and prefetch or DEFAULT_PREFETCH)
    self._handler = handler
    self._error_delay = opts.error_delay or 1
    self._workers, self._idle, self._waking = 0, 0, false
    self._tasks = setmetatable({}, { __mode = "k" }) -- of the workers
  end
  local calls, refusal = self:_subscribe(level)
  if not calls then return nil, refusal end
  channel._consumers[tag] = self
  local deadline = runtime.now() + (opts.timeout or channel.timeout)
  for i = 1, #calls do
    local ok, err = session:await(calls[i], math.max(0, deadline - runtime.now()))
    if not ok then
      for j = i + 1, #calls do calls[j].abandoned = true end
      if not self._ended then
        self._ended = err
        if channel._consumers[tag] == self then channel._consumers[tag] = nil end
      end
      return nil, err
    end
  end
  self._started, self._asking = true, nil
  return self
end

--- The fields of its basic.consume.
---@package
function Consumer:_consume_fields()
  local opts = self._opts
  return {
    queue = self.queue, consumer_tag = self.tag, no_local = opts.no_local, no_ack = opts.no_ack,
    exclusive = opts.exclusive, arguments = survival.from_there(self, all_arguments(opts)),
  }
end

--- Takes its messages from this DeliveryQueue, after those that have arrived in the one before.
---@package
function Consumer:_takes(queue)
  self._pop = self._reads_stream and survival.counting(self, queue.pop) or queue.pop
  if self._deliveries and self:buffered() > 0 then
    self._later = self._later or {}
    self._later[#self._later + 1] = queue
  else
    self._deliveries, self._later = queue, nil
  end
end

-- A consumer whose start was given up, and that started after all.
function Consumer:_abandon()
  local channel = self.channel
  if channel._closed then return end
  if not self._ended then
    self._ended = self._session:error("cancelled", "nobody waited for its start any more", { temporary = false })
  end
  if channel._consumers[self.tag] == self then channel._consumers[self.tag] = nil end
  if channel._core:call("basic.cancel", { consumer_tag = self.tag }) then
    self:_discard()
    self._session:expect(channel._calls, "basic.cancel").abandoned = true
  end
end

-- ---- Taking messages --------------------------------------------------------------------------------

-- Deliveries came to an empty queue. Called by the session; must not yield.
---@package
function Consumer:_delivered()
  if not self._handler then
    if self._receiving > 0 or self._ready.bell then self._ready:signal() end
    self.connection:_ring_for(self)
    return
  end
  self:_wake_worker()
end

-- Messages that are taken one after the other without a wait keep the event loop, and with it the
-- heartbeats, from running. A turn at least so often, in seconds; but the clock is looked at once in so many messages.
local TURN_EVERY, MOST_BETWEEN = 0.25, 16

-- To be called for the first message; answers for how many messages not to be called then.
local function turner(runtime)
  local now, sleep = runtime.now, runtime.sleep
  local turned, step = now(), 1
  return function()
    if now() - turned > TURN_EVERY then
      sleep(0)
      turned = now()
      step = 1
    elseif step < MOST_BETWEEN then
      step = step * 2
    end
    return step
  end
end

-- The next message, after a DeliveryQueue that is empty that of the subscription after it.
local function take(self)
  local pop = self._pop
  local message = pop(self._deliveries)
  local later = self._later
  while not message and later and later[1] do
    self._deliveries = table.remove(later, 1)
    message = pop(self._deliveries)
  end
  return message
end

local function receive(self, timeout)
  local message = take(self)
  if message then return message end
  if self._ended then
    self:_let_go()
    return nil, self._ended
  end
  self._session:drain()
  local now = self._runtime.now
  local deadline = timeout < huge and now() + timeout
  local ready = self._ready
  self._receiving = self._receiving + 1
  self._waited_on = self._waited_on or timeout > 0
  repeat
    local left
    if deadline then
      left = deadline - now()
      if left <= 0 and timeout > 0 then break end
    end
    ready:wait(left and math.max(0, left))
    message = take(self)
    if message or timeout == 0 then break end
  until self._ended
  self._receiving = self._receiving - 1
  if message then
    if self._receiving > 0 and self._deliveries:count() > 0 then ready:signal() end
    return message
  end
  if self._ended then
    self:_let_go()
    return nil, self._ended
  end
  return nil, self._session:error("timeout", ("no message within %g s"):format(timeout)
    .. (self._down and " (the consumer is coming back: " .. self._down.message .. ")" or ""))
end

--- Takes the next message, waiting for one, also while the consumer is coming back. err.kind `timeout`: none
--- came; anything else: the consumer has ended, as Consumer:reason says.
---@param timeout number? seconds; nil: for ever; 0: only what has arrived
---@return moonrabbit.Message|nil, moonrabbit.Error?
function Consumer:receive(timeout)
  if timeout ~= nil then options.argument("Consumer:receive", "timeout", timeout, options.seconds) end
  if self._handler then error("Consumer:receive: this consumer has a handler", 2) end
  if timeout ~= 0 then
    self._turn = self._turn or turner(self._runtime)
    self._until_turn = (self._until_turn or 1) - 1
    if self._until_turn <= 0 then self._until_turn = self._turn() end
  end
  return receive(self, timeout or huge)
end

--- Iterates over the messages until the consumer ends; Consumer:reason tells why it did. Waits for each in
--- the way of the runtime: in a task it yields, in a plain script it runs the event loop.
---@return fun(): moonrabbit.Message?
function Consumer:messages()
  if self._handler then error("Consumer:messages: this consumer has a handler", 2) end
  self._waited_on = true
  local queue, pop = self._deliveries, self._pop
  local turn, countdown = turner(self._runtime), 1
  return function()
    countdown = countdown - 1
    if countdown == 0 then countdown = turn() end
    local message = pop(queue)
    if message then return message end
    message = receive(self, huge)
    queue = self._deliveries -- of the present subscription
    return message
  end
end

--- Why the consumer ended for good, or nil while it has not. err.kind: `cancelled` (err.temporary when the
--- broker did it), or what ended its channel or connection.
---@return moonrabbit.Error?
function Consumer:reason()
  return self._ended
end

-- ---- Handlers ---------------------------------------------------------------------------------------

-- A worker takes messages until there are none and then waits. As one takes a message and sees more,
-- it gets the next worker going: at most one a turn, so that handlers that never yield cost nothing.

local function report(self, message, trace)
  self.connection:_report("error", "a handler of the consumer on '" .. self.queue .. "' threw: " .. trace, message)
  if self.no_ack then return end
  local delay = self._error_delay
  local function give_back()
    if delay > 0 then self._runtime.sleep(delay) end
    if core.settle(message, "nack", true) ~= nil then self._session:touch() end
  end
  if delay > 0 then self._runtime.spawn(give_back) else give_back() end
end

-- Handles messages until the queue is empty. state.message is the one being handled.
local function work(self, state)
  local pop, handler, turn = self._pop, self._handler, state.turn
  local message = take(self)
  local queue = self._deliveries
  local countdown = 1
  while message do
    if not self._waking and queue:count() > 0 then self:_wake_worker() end
    state.message = message
    handler(message)
    state.message = nil
    countdown = countdown - 1
    if countdown == 0 then countdown = turn() end
    message = pop(queue)
    if not message then
      message = take(self)
      queue = self._deliveries
    end
  end
end

local function traceback(err)
  if type(err) == "table" or type(err) == "userdata" then
    local meta = getmetatable(err)
    if not (meta and meta.__tostring) then return debug.traceback("(error object is a " .. type(err) .. ")", 2) end
  end
  return debug.traceback(described(err), 2)
end

local function worker(self, protect)
  local state = { turn = turner(self._runtime) }
  local current = self._runtime.current
  local me = current and current()
  if me then self._tasks[me] = true end
  local cancelled = self._runtime.cancelled
  self._waking = false
  while true do
    local ok, trace = protect(work, self, state)
    if not ok then
      local message = state.message
      state.message = nil
      if trace == cancelled and cancelled ~= nil then
        self._workers = self._workers - 1
        if self._drained then self._drained:broadcast() end
        return
      end
      if message then report(self, message, trace) else self.connection:_report("error", trace) end
    elseif self._ended and self:buffered() == 0 then
      break
    else
      self._idle = self._idle + 1
      self._session:drain()
      local whole, err = yielding_pcall(self._ready.wait, self._ready)
      self._idle = self._idle - 1
      self._waking = false
      if not whole then -- cancelled, by its handler perhaps: another one takes its place
        self._workers = self._workers - 1
        if self:buffered() > 0 then self:_wake_worker() end
        if self._drained then self._drained:broadcast() end
        error(err, 0)
      end
    end
  end
  self._workers = self._workers - 1
  if me then self._tasks[me] = nil end
  if self._drained then self._drained:broadcast() end
  self:_let_go()
end

-- xpcall of (f, a, b) that keeps a traceback and lets f yield. PUC Lua 5.1 has no such thing: there
-- the traceback is missing its inner half.
local function protector(runtime)
  local cancelled = runtime.cancelled
  local function handle(err)
    if cancelled ~= nil and err == cancelled then return err end
    return traceback(err)
  end
  if yielding_pcall ~= pcall then
    return function(f, a, b)
      local ok, err = yielding_pcall(f, a, b)
      if ok then return true end
      if err == cancelled then return false, err end
      return false, type(err) == "string" and err or traceback(err)
    end
  end
  return function(f, a, b) return xpcall(f, handle, a, b) end
end

---@package
function Consumer:_wake_worker()
  if self._waking then return end
  if self._idle > 0 then
    self._waking = true
    self._ready:signal()
  elseif self._workers < self.concurrency then
    self._waking = true
    self._workers = self._workers + 1
    self._protect = self._protect or protector(self._runtime)
    self._runtime.spawn(worker, self, self._protect)
  end
end

-- ---- Ending -----------------------------------------------------------------------------------------

-- What came and was not taken goes back, and so does what still comes.
function Consumer:_discard()
  self._deliveries:discard()
  for _, queue in ipairs(self._later or {}) do queue:discard() end
  self._session:drain()
  self._session:touch()
end

--- Ends it. `keep`: what has arrived may still be taken.
---@package
function Consumer:_finish(err, keep)
  if self._ended then return end
  self._ended = err
  if not keep and not self.no_ack then
    -- Of a channel that is gone: the broker delivers them again, and nobody could settle these.
    self:_discard()
  end
  self._ready:broadcast()
  self.connection:_ring()
  if self._handler and keep and self:buffered() > 0 then self:_wake_worker() end
end

---@class moonrabbit.CancelOptions
---@field drain boolean?   what has arrived can still be taken, or is still handled; false by default
---@field timeout number?  seconds; the channel's by default

local cancel_options = { drain = options.boolean, timeout = options.seconds }

-- Waits until its handlers have ended, but for the one that calls.
local function wait_for_handlers(self, timeout, deadline)
  local current = self._runtime.current
  local me = current and current()
  local own = me and self._tasks[me] and 1 or 0
  local now = self._runtime.now
  self._drained = self._drained or self._runtime.condition()
  while self._workers > own do
    local left = deadline - now()
    if left <= 0 then
      return nil, self._session:error("timeout",
        ("%d handlers have not ended within %g s"):format(self._workers, timeout))
    end
    self._drained:wait(left < huge and left or nil)
  end
  return true
end

--- Stops it. Messages that have arrived and were not taken yet go back to the queue, unless told to
--- `drain`; with a handler the call then also waits until the last one has been handled. basic.cancel
---@param opts moonrabbit.CancelOptions?
---@return true|nil, moonrabbit.Error?
function Consumer:cancel(opts)
  opts = options.check("Consumer:cancel", opts, cancel_options)
  local channel, session = self.channel, self._session
  if self._ended then return true end
  local now = self._runtime.now
  local timeout = opts.timeout or channel.timeout
  local deadline = now() + timeout
  local result, err
  if self._down then
    result = true -- the broker knows of none; one that is being started is cancelled when the answer comes
  else
    local ok, status = channel._core:call("basic.cancel", { consumer_tag = self.tag })
    if not ok then
      if status == "closed" then return nil, channel:_closed_error() end
      return nil, session:refusal(status, "Consumer:cancel")
    end
    result, err = session:await(session:expect(channel._calls, "basic.cancel"), timeout)
  end
  if not self._ended then
    if not opts.drain and not self.no_ack then self:_discard() end
    self:_finish(session:error("cancelled", "cancelled by consumer:cancel()", { temporary = false }), true)
  end
  if channel._consumers[self.tag] == self then channel._consumers[self.tag] = nil end
  if result then channel._receivers[self._deliveries] = nil end
  self.connection:_unused(self.queue)
  if not result and not (err.kind == "closed" or err.kind == "channel") then return nil, err end
  if self._handler and (opts.drain or self._owns_channel) then
    local drained, late = wait_for_handlers(self, timeout, deadline)
    if not drained then return nil, late end
  end
  if self._owns_channel and not (opts.drain and not self._handler) and (self._workers or 0) == 0 then
    return channel:close(math.max(0, deadline - now()))
  end
  self:_let_go()
  return true
end

-- The channel that was opened for it closes as soon as nothing is left to handle or to settle there.
---@package
function Consumer:_let_go()
  if not self._owns_channel or not self._ended or self.channel._over then return end
  if (self._workers or 0) > 0 or self:buffered() > 0 then return end
  if not self._handler and self.channel:unsettled() > 0 then return end
  self.channel:_abandon()
end

--- How many messages have arrived and were not taken yet.
---@return integer
function Consumer:buffered()
  local n = self._deliveries:count()
  for _, queue in ipairs(self._later or {}) do n = n + queue:count() end
  return n
end

function Consumer:__tostring()
  return ("%s %s on '%s' (%s)"):format(Consumer.__name, self.tag, self.queue,
    self._ended and "ended: " .. self._ended.kind or self._down and "coming back" or "open")
end

Consumer.options = consume_options

return Consumer
