-- Finalizers that publish while output is drained: what comes out must be each message once, whole. Prints how many, and
-- throws where one is missing, cut or twice, or where no finalizer has met a drain.
local fake = require "support.fake_broker"
local guard = require "support.guard"

local b = fake.new():open()
local channel = b:channel()
local sent, meanwhile, draining, pieces = 0, 0, false, {}

local function send()
  local number = sent + 1 -- what follows allocates, and so may run send
  sent = number
  assert(channel:publish(("%06d"):format(number):rep(1000), { routing_key = "q" }))
end

local function finalize() -- many may come at once
  if b.engine:pending() > 500000 then return end
  if draining then meanwhile = meanwhile + 1 end
  send()
end

collectgarbage("setpause", 0) -- collects all the time
collectgarbage("setstepmul", 1000)
local round = 0
repeat
  round = round + 1
  send()
  send()
  guard(finalize)
  draining = true
  repeat pieces[#pieces + 1] = b.engine:drain(0, 8192) until b.engine:pending() == 0
  draining = false
until meanwhile > 20 or round == 5000
collectgarbage()
pieces[#pieces + 1] = b.engine:drain(0)

local n, seen = 0, {}
for _, frame in ipairs(fake.frames(table.concat(pieces))) do
  if frame.kind == 3 then
    local number = frame.payload:sub(1, 6)
    assert(frame.payload == number:rep(1000), "cut: " .. number)
    assert(not seen[number], "twice: " .. number)
    n, seen[number] = n + 1, true
  end
end
assert(n == sent, n .. " of " .. sent .. " came")
assert(meanwhile > 0, "no finalizer has met a drain")
print(("%d messages, %d of them by finalizers during a drain"):format(n, meanwhile))
