--- What stands for the broker in a test: it notes what is published, and knows two kinds of places: steps of a ladder,
-- which bring a message back after their time, and queues of dead letters.
-- @module moonrabbit.testing.broker

local errors = require "moonrabbit.errors"
local trace = require "moonrabbit.trace"

---@class moonrabbit.testing.Message
---@field body string
---@field exchange string
---@field routing_key string
---@field headers table<string, any>
---@field properties table<string, any>
---@field redelivered boolean
---@field message_id string?  properties.message_id
local Message = {}
Message.__index = Message

local broker = {}

local function copy(map)
  local all = {}
  for name, value in pairs(map or {}) do all[name] = value end
  return all
end

--- A message. `bench`: moonrabbit.testing's.
---@package
function broker.message(bench, body, fields)
  return setmetatable({
    body = body, exchange = fields.exchange or "", routing_key = fields.routing_key or "",
    headers = copy(fields.headers), properties = copy(fields.properties), redelivered = fields.redelivered or false,
    delivery_tag = 1, consumer_tag = "testing", channel = bench.channel, _bench = bench,
    message_id = fields.properties and fields.properties.message_id,
  }, Message)
end

local function settle(message, what, value)
  if message.settled then error(("Message:%s: the message was settled before"):format(what), 3) end
  message.settled = value
  return true
end

function Message:ack() return settle(self, "ack", "ack") end
function Message:nack(opts) return settle(self, "nack", opts and opts.requeue == false and "reject" or "back") end
function Message:reject(opts) return settle(self, "reject", opts and opts.requeue and "back" or "reject") end

function Message:trace() return (trace.of(self)) end

function Message:reply(body, opts)
  local to = self.properties.reply_to
  if not to then return nil, errors.new { kind = "unroutable", message = "the message asks for no reply" } end
  local all = copy(opts)
  all.exchange, all.routing_key, all.correlation_id = "", to, self.properties.correlation_id
  return self._bench:_publish(body, all)
end

-- Timestamps and the like are the values that they would arrive as.
local function plain(value)
  return type(value) == "userdata" and tonumber(tostring(value)) or value
end

function Message:forward(exchange, key, opts)
  opts = opts or {}
  local made = broker.message(self._bench, self.body, {
    exchange = exchange, routing_key = key or self.routing_key, headers = self.headers, properties = self.properties,
  })
  for _, name in ipairs(opts.remove or {}) do made.headers[name] = nil end
  for _, name in ipairs(opts.remove_properties or {}) do made.properties[name] = nil end
  for name, value in pairs(opts.set or {}) do made.headers[name] = plain(value) end
  return self._bench:_arrived(made, self)
end

local fields_of_publish = { exchange = true, routing_key = true, headers = true, mandatory = true, timeout = true }

--- What `publish` makes.
---@package
function broker.published(bench, body, opts)
  local properties = {}
  for name, value in pairs(opts or {}) do
    if not fields_of_publish[name] then properties[name] = value end
  end
  opts = opts or {}
  return broker.message(bench, body, {
    exchange = opts.exchange, routing_key = opts.routing_key, headers = opts.headers, properties = properties,
  })
end

local Channel = {}
Channel.__index = Channel

local function yes() return true end
for _, name in ipairs { "exchange_declare", "queue_declare", "queue_bind", "exchange_bind", "close", "is_open" } do
  Channel[name] = yes
end

--- A channel, with its connection, on which everything can be declared.
---@package
function broker.channel(runtime)
  local connection = { _runtime = runtime, call_timeout = 10 }
  local channel = setmetatable({ connection = connection, _runtime = runtime, timeout = 10 }, Channel)
  function connection.channel() return channel end
  function connection.server() return { product = "RabbitMQ", version = "4.0.0" } end
  return channel
end

-- Seconds, when an exchange is a step of a ladder.
---@package
function broker.wait_of(exchange)
  local number, unit = exchange:match "%.wait%.(%d+)(m?s)$"
  if not number then return nil end
  return tonumber(number) / (unit == "ms" and 1000 or 1)
end

--- Settling as the runner does it.
broker.settle = {}
local function settler(value)
  return function(message)
    if message.settled then return nil, "settled" end
    message.settled = value
    return true
  end
end
broker.settle.ack, broker.settle.back, broker.settle.reject = settler "ack", settler "back", settler "reject"
function broker.settle.outstanding(message)
  if message.settled then return nil, "settled" end
  return true
end

return broker
