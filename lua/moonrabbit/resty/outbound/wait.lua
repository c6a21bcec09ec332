--- Waiting for a semaphore as long as a caller likes.
-- @module moonrabbit.resty.outbound.wait

local LONG = require("moonrabbit.runtime.resty.limits").LONG

--- Waits for a semaphore for so many seconds, or for ever (math.huge).
return function(sema, seconds)
  while seconds > LONG do
    if sema:wait(LONG) then return end
    seconds = seconds - LONG
  end
  sema:wait(seconds)
end
