--- When the event loop is due a turn.
--
-- Messages that are taken one after the other without a wait keep the event loop, and with it the
-- heartbeats, from running. A turn at least so often, in seconds; but the clock is looked at once in so many messages.
-- @module moonrabbit.consumer.turner

local TURN_EVERY, MOST_BETWEEN = 0.25, 16

--- To be called for the first message; answers for how many messages not to be called then.
return function(runtime)
  local now, sleep = runtime.now, runtime.sleep
  local turned, step = now(), 1
  return function()
    if now() - turned > TURN_EVERY then
      sleep(0)
      turned = now()
      step = 1
    elseif step < MOST_BETWEEN then
      step = step * 2
    end
    return step
  end
end
