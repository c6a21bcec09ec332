--- The app that chaos/kills runs by `moonrabbit run` and kills. KILLS_SETTINGS is a Lua file that returns its settings:
-- { name, queue, seed, ledger, database, dedupe }.
local mr = require "moonrabbit"
local effects = require "chaos.effects"
local fates = require "chaos.fates"
local ledger = require "chaos.ledger"

local settings = dofile(os.getenv "KILLS_SETTINGS")
local book = ledger.open(settings.ledger)
local database = effects.open(settings.database)

-- The handler's row and the key of its message are one transaction.
local store = settings.dedupe and mr.dedupe.sql {
  driver = settings.database.driver, connection = function() return database.connection end,
}

local function handler(msg)
  local number, attempt = tonumber(msg.body), (msg.headers["moonrabbit-attempts"] or 0) + 1
  local fails, way = fates.of(settings.seed, number)
  local failed = attempt <= fails
  -- A failure comes after the effect where the transaction takes it back, and before it where nothing would.
  if store or not failed then database:add(number, attempt) end
  if not failed then return end
  if way == "permanent" then error(mr.permanent "it never works") end
  if way == "throw" then error "it does not work" end
  return nil, "it does not work yet"
end

return mr.app {
  name = settings.name,
  queues = { [settings.queue] = {} },
  observer = {
    delivered = function(_, msg)
      if msg.redelivered then book:write("redelivered", settings.queue) end
    end,
    settled = function(queue, outcome) book:write("settled", queue, 0, outcome) end,
  },
  consumers = {
    { queue = settings.queue, prefetch = 64, concurrency = 1, timeout = 60, dedupe = store or nil,
      retry = mr.retry.steps(fates.DELAYS), handler = handler },
  },
}
