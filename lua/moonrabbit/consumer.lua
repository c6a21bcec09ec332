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

local options = require "moonrabbit.options"
local parts = require "moonrabbit.parts"
local pollable = require "moonrabbit.pollable"
local ending = require "moonrabbit.consumer.ending"
local handling = require "moonrabbit.consumer.handling"
local survival = require "moonrabbit.consumer.survival"
local taking = require "moonrabbit.consumer.taking"

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

parts(Consumer, taking, handling, ending, survival)
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

-- The arguments to ask for a stream behind the last message that was taken, instead of from where it began.
local function from_there(self, arguments)
  local offset = self._offset
  if type(offset) ~= "number" then return arguments end
  local all = {}
  for key, value in pairs(arguments) do all[key] = value end
  all["x-stream-offset"] = offset + 1
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

local function new(channel, queue, tag, opts, handler)
  local runtime = channel._runtime
  local prefetch = choose_prefetch(channel, queue, opts)
  started = started + 1
  local self = setmetatable({
    channel = channel, connection = channel.connection, queue = queue, tag = tag, prefetch = prefetch,
    no_ack = opts.no_ack or false, kind = "consumer",
    _opts = opts, _session = channel._session, _runtime = runtime, _serial = started,
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
  return self
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

  local session, tag = channel._session, choose_tag(opts)
  if channel._consumers[tag] then error(what .. ": this channel has a consumer with that tag already", level) end
  if queue == "" then queue = channel._last_queue or queue end
  local self = new(channel, queue, tag, opts, handler)
  local calls, refusal = self:_subscribe(level)
  if not calls then return nil, refusal end
  channel._consumers[tag] = self
  local ok, err = session:await_all(calls, session.runtime.now() + (opts.timeout or channel.timeout))
  if not ok then
    if not self._ended then
      self._ended = err
      if channel._consumers[tag] == self then channel._consumers[tag] = nil end
    end
    return nil, err
  end
  if self._ended then -- right behind the answer
    if not self.no_ack then self:_discard() end
    return nil, self._ended
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
    exclusive = opts.exclusive, arguments = from_there(self, all_arguments(opts)),
  }
end

--- Why the consumer ended for good, or nil while it has not. err.kind: `cancelled` (err.temporary when the
--- broker did it), or what ended its channel or connection.
---@return moonrabbit.Error?
function Consumer:reason()
  return self._ended
end

function Consumer:__tostring()
  return ("%s %s on '%s' (%s)"):format(Consumer.__name, self.tag, self.queue,
    self._ended and "ended: " .. self._ended.kind or self._down and "coming back" or "open")
end

Consumer.options = consume_options

return Consumer
