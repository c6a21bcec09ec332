--- What is to become of each message of chaos/kills: most succeed, some fail once or twice first, some always. It
-- follows from the message's number and the seed, so that the worker and its judge agree.
local fates = {}

--- Attempts that the retry policy allows, and the delays between them, in seconds.
fates.ATTEMPTS, fates.DELAYS = 3, { 0.2, 0.5 }

-- So many of a thousand.
local PERMANENT, ALWAYS, TWICE, ONCE = 10, 20, 30, 100

local function draw(seed, n) return (n + 7 * seed) * 48271 % 2147483647 % 1000 end

--- How many attempts at a message fail, and how: "throw", "return" or "permanent".
---@return integer fails, string way
function fates.of(seed, n)
  local x = draw(seed, n)
  local way = x % 2 == 0 and "throw" or "return"
  if x < PERMANENT then return fates.ATTEMPTS, "permanent" end
  if x < PERMANENT + ALWAYS then return fates.ATTEMPTS, way end
  if x < PERMANENT + ALWAYS + TWICE then return 2, way end
  if x < PERMANENT + ALWAYS + TWICE + ONCE then return 1, way end
  return 0, way
end

--- Whether a message ends as a dead letter.
function fates.is_dead(seed, n)
  return (fates.of(seed, n)) >= fates.ATTEMPTS
end

--- Whether it is published twice, as by a publisher that did not hear the first confirm.
function fates.comes_twice(seed, n) return draw(seed + 1, n) < 10 end

--- What happens to so many messages when nobody is killed: { publishes, runs, done, dead }.
function fates.sums(seed, messages)
  local sums = { publishes = 0, runs = 0, done = 0, dead = 0 }
  for n = 1, messages do
    local fails, way = fates.of(seed, n)
    sums.publishes = sums.publishes + (fates.comes_twice(seed, n) and 2 or 1)
    if fails < fates.ATTEMPTS then
      sums.done, sums.runs = sums.done + 1, sums.runs + fails + 1
    else
      sums.dead, sums.runs = sums.dead + 1, sums.runs + (way == "permanent" and 1 or fails)
    end
  end
  return sums
end

return fates
