-- A broker inside this process, behind a runtime of its own: it opens what is asked for and says nothing else
-- unless told. What it does not yield in, nothing else can interrupt.
local native = require "moonrabbit.runtime.native"
local fake = require "support.fake_broker"
local core = require "moonrabbit.core"

local u16, u32, short, long = fake.u16, fake.u32, fake.short, fake.long

local scripted = {}

local Broker = {}
Broker.__index = Broker

--- The queue that a queue.declare names.
function scripted.queue(frame) return frame.args:sub(4, 3 + frame.args:byte(3)) end

--- The tag that a basic.consume asks for.
function scripted.tag(frame)
  local queue = frame.args:byte(3)
  return frame.args:sub(5 + queue, 4 + queue + frame.args:byte(4 + queue))
end

--- Answers a queue.declare.
function scripted.declared(frame)
  local name = scripted.queue(frame)
  return fake.method(frame.channel, 50, 11, short(name == "" and "amq.gen-new" or name) .. u32(0) .. u32(0))
end

--- Answers a basic.cancel.
function scripted.cancelled(frame)
  return fake.method(frame.channel, 60, 31, frame.args:sub(1, 1 + frame.args:byte(1)))
end

local answers = {
  ["10.11"] = function() return fake.method(0, 10, 30, u16(0) .. u32(131072) .. u16(60)) end,
  ["10.40"] = function() return fake.method(0, 10, 41, short "") end,
  ["10.50"] = function() return fake.method(0, 10, 51) end,
  ["20.10"] = function(frame) return fake.method(frame.channel, 20, 11, long "") end,
  ["20.40"] = function(frame) return fake.method(frame.channel, 20, 41) end,
  ["60.10"] = function(frame) return fake.method(frame.channel, 60, 11) end,
  ["60.20"] = function(frame) return fake.method(frame.channel, 60, 21, short(scripted.tag(frame))) end,
  ["85.10"] = function(frame) return fake.method(frame.channel, 85, 11) end,
}

local Transport = {}
Transport.__index = Transport

local function said(broker, bytes)
  if bytes:sub(1, 4) == "AMQP" then
    broker:say(fake.method(0, 10, 10, "\0\9" .. core.encode_table { product = "Scripted" } .. long "PLAIN"
      .. long "en_US"))
  end
  local line = broker.transport
  for _, frame in ipairs(fake.frames(bytes)) do
    if frame.id and not line.closed then -- what comes behind a cut is not heard
      broker.heard[#broker.heard + 1] = frame.id
      local answer = broker.answers[frame.id]
      if answer == nil then answer = answers[frame.id] end
      if answer then broker:say(answer(frame)) end
    end
  end
end

function Transport:fill(engine)
  local broker = self.broker
  while not self.closed do
    if broker.throw then error(broker.throw, 0) end
    local bytes = broker.out
    if bytes == "" and broker.flood then bytes = broker.flood() or "" end
    if bytes ~= "" and broker.transport == self then -- the newest connection hears it
      local taken = engine:feed(bytes, native.now())
      broker.out = bytes:sub(taken + 1)
      if taken == 0 then return nil, "full" end
      return taken
    end
    broker.more:wait()
  end
  return nil, "closed", "closed"
end

function Transport:flush(engine)
  if self.closed then return nil, "closed", "closed" end
  local bytes = engine:drain(native.now())
  if bytes ~= "" and not self.broker.deaf then said(self.broker, bytes) end
  return true
end

Transport.try_flush = Transport.flush

function Transport:close()
  self.closed = true
  self.broker.more:broadcast()
end

--- Sends bytes to the client.
function Broker:say(bytes)
  self.out = self.out .. bytes
  self.more:broadcast()
end

--- How often it has heard a method: "50.10".
function Broker:times(id)
  local n = 0
  for _, each in ipairs(self.heard) do n = n + (each == id and 1 or 0) end
  return n
end

--- Cuts the line.
function Broker:cut()
  self.transport:close()
end

--- Waits, with the loop running, until fn returns something true; throws after `seconds`.
function scripted.eventually(fn, seconds)
  local deadline = native.now() + seconds
  while not fn() do
    assert(native.now() < deadline, "did not happen in time")
    native.sleep(0.002)
  end
end

--- One; give its `runtime` to connect. Set `answers[id]` (a function of the frame, or false for silence), `deaf`,
--- `flood` (a function that gives bytes whenever there are none to send), `throw`.
function scripted.start()
  local self = setmetatable({ out = "", more = native.condition(), answers = {}, heard = {} }, Broker)
  self.runtime = setmetatable({
    open = function()
      self.out = "" -- what the last connection was not told
      self.transport = setmetatable({ broker = self }, Transport)
      return self.transport
    end,
  }, { __index = native, __newindex = native })
  return self
end

return scripted
