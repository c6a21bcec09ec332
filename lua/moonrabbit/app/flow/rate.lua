--- A rate: so many messages a second, by a bucket of tokens. Whoever comes when it is empty takes a token that
-- will be there, and waits until it is: so they go in the order in which they came.
-- @module moonrabbit.app.flow.rate

---@class moonrabbit.app.Rate
local Rate = {}
Rate.__index = Rate

---@param spec number|{ limit: number, burst: integer? } burst: a tenth of a second's worth by default
---@param now number
---@return moonrabbit.app.Rate
function Rate.new(spec, now)
  local limit = type(spec) == "table" and spec.limit or spec
  local burst = type(spec) == "table" and spec.burst or math.max(1, math.floor(limit / 10))
  return setmetatable({ limit = limit, burst = burst, tokens = burst, at = now }, Rate)
end

--- Takes n tokens; how many seconds to wait for them.
---@param n integer
---@param now number
---@return number seconds 0: none
function Rate:take(n, now)
  local tokens = math.min(self.burst, self.tokens + (now - self.at) * self.limit) - n
  self.tokens, self.at = tokens, now
  return tokens < 0 and -tokens / self.limit or 0
end

return Rate
