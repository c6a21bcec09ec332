-- A runner of an app's consumer without a broker: messages are tables, what is done with them is noted.
local Runner = require "moonrabbit.app.runner"
local plan = require "moonrabbit.app.plan"
local virtual = require "support.virtual_loop"

local Rig = {}
Rig.__index = Rig

local rig = {}

local settle = {}

local function settled(kind)
  return function(message, detail)
    if message.gone then return nil, "closed" end
    if message.done then return nil, "settled" end
    message.done = detail or kind
    return true
  end
end

settle.ack = settled "ack"
settle.back = settled "back"
settle.reject = settled "reject"

function settle.outstanding(message)
  if message.gone then return nil, "closed" end
  if message.done then return nil, "settled" end
  return true
end

local Disposal = {}
Disposal.__index = Disposal

function Disposal:attempt(message) return message.attempts or 1 end

function Disposal:retry(message, delay, failure, attempt)
  self.copies[#self.copies + 1] = { "retry", message, delay, failure, attempt }
  if self.fails then return nil, self.fails end
  return true
end

function Disposal:dead_letter(message, reason, failure, attempt)
  self.copies[#self.copies + 1] = { "dead_letter", message, reason, failure, attempt }
  if self.fails then return nil, self.fails end
  return true
end

--- Of a consumer's fields; `queue` and the rest are filled in.
function rig.new(consumer)
  consumer.queue = consumer.queue or "q"
  local compiled = assert(plan.compile { name = "spec", queues = { q = {} }, consumers = { consumer } })
  local self = setmetatable({ runtime = virtual.new(), events = {}, outcomes = {}, failures = {}, log = {} }, Rig)
  self.disposal = setmetatable({ copies = {} }, Disposal)
  self.copies = self.disposal.copies
  self.app = { sent = {} }
  function self.app.forward(app, message, exchange, key, opts)
    app.sent[#app.sent + 1] = { message, exchange, key, opts }
    return not app.fails and true or nil, app.fails
  end
  function self.app.publish(app, body, opts)
    app.sent[#app.sent + 1] = { body, opts }
    return true
  end
  self.runner = Runner.new(compiled.consumers[1], {
    runtime = self.runtime, disposal = self.disposal, settle = settle, app = self.app,
    log = function(level, text) self.log[#self.log + 1] = level .. ": " .. text end,
    observer = {
      settled = function(_, outcome, seconds, detail)
        self.outcomes[#self.outcomes + 1] = outcome
        self.seconds, self.detail = seconds, detail
      end,
      failed = function(_, failure) self.failures[#self.failures + 1] = failure end,
      event = function(name, fields) self.events[#self.events + 1] = { name = name, fields = fields } end,
      canary = function(...) self.canaries = self.canaries or {}; table.insert(self.canaries, { ... }) end,
      in_flight = function(_, n) self.most = math.max(self.most or 0, n) end,
    },
  })
  return self
end

--- A message; it is handled in a task of its own.
function Rig:give(fields)
  local message = fields or {}
  message.routing_key = message.routing_key or "key"
  message.properties = message.properties or {}
  message.headers = message.headers or {}
  message.body = message.body or ""
  self.runtime.spawn(function() self.runner:handle(message) end)
  return message
end

--- The same, and it runs for so many seconds.
function Rig:handle(fields, seconds)
  local message = self:give(fields)
  self.runtime.advance(seconds or 0)
  return message
end

return rig
