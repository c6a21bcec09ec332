--- What nginx's timers can be told.

-- nginx without OpenResty's patches has no zero delay and complains about it.
local LEAST = 0.001
-- As long as its timers allow, which count milliseconds in a C int, with some room; waits without a timeout are made of
-- these.
local LONG = 86400

local max, min, floor = math.max, math.min, math.floor

--- Seconds as the milliseconds that a cosocket wants.
---@param seconds number
---@return integer
local function ms(seconds) return max(1, min(2147483647, floor(seconds * 1000))) end

return { LEAST = LEAST, LONG = LONG, ms = ms }
