-- What the specs of running apps share: a folder with a script, and queues of its own.
local broker = require "support.broker"
local process = require "support.process"

local life = {}

local Bench = {}
Bench.__index = Bench

--- A folder for scripts and files. `start` runs its script.
function life.new()
  local path = os.tmpname()
  os.remove(path)
  os.execute("mkdir -p " .. path)
  local self = setmetatable({ folder = path, name = broker.unique "life", running = {} }, Bench)
  self.queue = self.name .. ".work"
  return self
end

--- Opens `channel`, with confirms.
function Bench:connect()
  self.channel = broker.ok(broker.connect():channel { confirm = true })
  return self.channel
end

function Bench:publish(body, opts)
  opts = opts or {}
  opts.routing_key = self.queue
  broker.ok(self.channel:publish(body, opts))
end

function Bench:path(name) return self.folder .. "/" .. name end

function Bench:write(name, text)
  local file = assert(io.open(self:path(name), "wb"))
  file:write((text:gsub("%$NAME", self.name):gsub("%$QUEUE", self.queue):gsub("%$FOLDER", self.folder)))
  file:close()
  return self:path(name)
end

--- Lines that the script has written to a file.
function Bench:lines(name)
  local all = {}
  for line in (process.slurp(self:path(name)) or ""):gmatch "[^\n]+" do all[#all + 1] = line end
  return all
end

--- Runs `moonrabbit run app.lua`, or another command, with these words.
function Bench:start(words, env, command)
  local all = { "bin/moonrabbit", command or "run", not command and self:path "app.lua" or nil }
  for _, word in ipairs(words or {}) do all[#all + 1] = word end
  env = env or {}
  env.AMQP_URL = env.AMQP_URL or broker.url
  local running = process.start(all, { env = env })
  self.running[#self.running + 1] = running
  return running
end

--- Waits until stderr holds a text.
function life.said(running, text)
  return broker.eventually(function()
    local ended = running:code() -- asked first: it may say it and end between the two
    return running:err():find(text, 1, true) or ended and error("it ended: " .. running:err(), 0)
  end, 20, text)
end

function life.ended(running)
  broker.eventually(function() return running:code() end, 20, "its end")
  return running:code()
end

--- Ends what was started, and removes the folder.
function Bench:stop()
  for _, running in ipairs(self.running) do running:stop() end
  os.execute("rm -rf " .. self.folder)
end

--- Takes what the apps have declared from the broker, the queues and exchanges with these endings too, and closes
--- every connection.
function Bench:clean(...)
  local channel = broker.ok(broker.connect():channel())
  for _, ending in ipairs { ".work", ".dead", ".orphans", ".home", ... } do
    channel:queue_delete(self.name .. ending)
    channel:exchange_delete(self.name .. ending)
  end
  broker.close_all()
end

return life
