--- A broker that drops everyone, in a process of its own: it shakes hands, answers what it is asked, and closes the
-- connection without a word once a message has been published to it (or `LIFE` seconds after it was opened).
--
--     lua5.4 dropping_broker.lua [at_once]      prints its port; at_once: drops right after connection.open
local native = require "moonrabbit.runtime.native"
local core = require "moonrabbit.core"
local fake = require "support.fake_broker"

local u16, u32, short, long = fake.u16, fake.u32, fake.short, fake.long
local at_once = arg[1] == "at_once"
local LIFE = 1

local function reply(frame, class, method, arguments)
  return fake.method(frame.channel, class, method, arguments)
end

-- What answers a method; nil: nothing does.
local answers = {
  ["10.11"] = function(frame) return reply(frame, 10, 30, u16(0) .. u32(131072) .. u16(60)) end,
  ["10.40"] = function(frame) return reply(frame, 10, 41, short "") end,
  ["10.50"] = function(frame) return reply(frame, 10, 51) end,
  ["20.10"] = function(frame) return reply(frame, 20, 11, long "") end,
  ["20.40"] = function(frame) return reply(frame, 20, 41) end,
  ["40.10"] = function(frame) return reply(frame, 40, 11) end,
  ["50.10"] = function(frame)
    local size = frame.args:byte(3)
    return reply(frame, 50, 11, frame.args:sub(3, 3 + size) .. u32(0) .. u32(0))
  end,
  ["50.20"] = function(frame) return reply(frame, 50, 21) end,
  ["60.10"] = function(frame) return reply(frame, 60, 11) end,
  ["60.20"] = function(frame)
    local queue = frame.args:byte(3)
    local tag = frame.args:sub(5 + queue, 4 + queue + frame.args:byte(4 + queue))
    -- A delivery that is never settled, for the line is cut.
    return reply(frame, 60, 21, short(tag)) .. fake.deliver(frame.channel, tag, 1, "hello")
  end,
  ["85.10"] = function(frame) return reply(frame, 85, 11) end,
}

local greeting = fake.method(0, 10, 10,
  "\0\9" .. core.encode_table { product = "Dropping" } .. long "PLAIN" .. long "en_US")

-- The whole frames at the start of `bytes`, and what is left.
local function split(bytes)
  local at = bytes:sub(1, 4) == "AMQP" and 9 or 1
  local first = at
  while #bytes >= at + 6 do
    local size = fake.number(bytes, at + 3, 4)
    if #bytes < at + 7 + size then break end
    at = at + 8 + size
  end
  return first == 9, fake.frames(bytes:sub(first, at - 1)), bytes:sub(at)
end

local function serve(client)
  local rest, dropped = "", false
  local function drop()
    if not dropped then
      dropped = true
      client:close()
    end
  end
  native.spawn(function()
    native.sleep(LIFE)
    drop()
  end)
  while not dropped do
    local bytes = client:read(65536)
    if not bytes then break end
    local begins, frames
    begins, frames, rest = split(rest .. bytes)
    local out = {}
    if begins then out[1] = greeting end
    local over = false
    for _, frame in ipairs(frames) do
      local answer = frame.id and answers[frame.id]
      if answer then out[#out + 1] = answer(frame) end
      over = over or frame.id == "60.40" or (at_once and frame.id == "10.40")
    end
    if #out > 0 then client:write(table.concat(out)) end
    if over then break end
  end
  drop()
end

native.run(function()
  local server = assert(native.listen("127.0.0.1", 0))
  print(server:port())
  io.stdout:flush()
  while true do
    local client = server:accept()
    if client then native.spawn(serve, client) end
  end
end)
