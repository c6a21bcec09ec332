-- Numbers that look random and are the same in every run: chance(seed) answers a function, 0 <= x < 1.
local MODULUS = 2147483647 -- Park and Miller's generator: products stay below 2^53

return function(seed)
  local state = seed
  return function()
    state = state * 48271 % MODULUS
    return (state - 1) / (MODULUS - 1)
  end
end
